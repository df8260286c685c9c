"""Importance metrics: one file a family, and the registry that names them."""

from __future__ import annotations

from .base import ImportanceMetric
from .group_taylor import GroupTaylor
from .magnitude import Magnitude
from .quantile_mean import QuantileMean
from .random_control import RandomControl
from .taylor import Taylor
from .wanda import Wanda
from .zo_taylor import ZoTaylor

METRIC_CLASSES: dict[str, type[ImportanceMetric]] = {
    "magnitude": Magnitude,
    "taylor": Taylor,
    "group_taylor": GroupTaylor,
    "zo_taylor": ZoTaylor,
    "quantile_mean": QuantileMean,
    "wanda": Wanda,
    "random": RandomControl,
}

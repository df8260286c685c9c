"""Importance metrics: one file a family, and the registry that names them."""

from __future__ import annotations

from .base import ImportanceMetric
from .metrics.group_taylor import GroupTaylor
from .metrics.magnitude import Magnitude
from .metrics.quantile_mean import QuantileMean
from .metrics.random_control import RandomControl
from .metrics.taylor import Taylor
from .metrics.wanda import Wanda
from .metrics.zo_taylor import ZoTaylor

METRIC_CLASSES: dict[str, type[ImportanceMetric]] = {
    "magnitude": Magnitude,
    "taylor": Taylor,
    "group_taylor": GroupTaylor,
    "zo_taylor": ZoTaylor,
    "quantile_mean": QuantileMean,
    "wanda": Wanda,
    "random": RandomControl,
}

"""Importance metrics: one file a family, and the registry that names them."""

from __future__ import annotations

from .base import ImportanceMetric
from .group_taylor import GroupTaylor
from .magnitude import Magnitude
from .random_control import RandomControl

METRIC_CLASSES: dict[str, type[ImportanceMetric]] = {
    "magnitude": Magnitude,
    "group_taylor": GroupTaylor,
    "random": RandomControl,
}

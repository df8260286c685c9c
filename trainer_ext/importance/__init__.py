"""Importance metrics: what they share, and in `metrics` one file a family."""

from . import metrics  # noqa: F401 (registers them)

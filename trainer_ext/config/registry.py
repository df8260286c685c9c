"""The importance metrics by name; each file in importance/metrics registers its class here."""

from __future__ import annotations

from collections.abc import Callable

METRICS: dict[str, type] = {}


def register(name: str) -> Callable[[type], type]:
    """Decorator: make a class the importance metric of this name."""

    def add(metric: type) -> type:
        METRICS[name] = metric
        return metric

    return add

"""What every importance metric offers to the calibration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch

from ..class_column import RowClasses
from ..tuner.layer import SpftLinear


class ImportanceMetric(ABC):
    """Scores the output neurons of the given layers.

    A metric is used once: `attached()` around the whole calibration, `observe` for every
    calibration batch, then `scores`.

    Attributes:
        needs_data: whether `observe` must be called at all.
        row_classes: holds the classes of the rows that the model is working on, where batches
            carry them; put here by the calibration before the first batch.
    """

    needs_data: bool = True
    row_classes: RowClasses | None = None

    def __init__(self, layers: dict[str, SpftLinear], seed: int = 0) -> None:
        self.layers = layers
        self.seed = seed

    def attached(self) -> AbstractContextManager:
        """Whatever must be in place while batches run; undone on exit, whatever happens."""
        return nullcontext()

    def observe(self, run_batch: Callable[[bool], None]) -> None:  # noqa: B027 (not all need data)
        """Take in one calibration batch.

        Args:
            run_batch: runs the loss of one optimizer step's data on this process; with True also
                the backward. A metric may call it as often as it needs, every time with the same
                data.
        """

    @abstractmethod
    def scores(self) -> dict[str, torch.Tensor]:
        """Layer name -> float64 (d_out,) on the CPU, the same on all processes."""

    def silent_layers(self) -> list[str]:
        """Layers that the data never reached, so that their scores say nothing."""
        return []

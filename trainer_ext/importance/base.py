"""What every importance metric offers to the calibration."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import nn

from ..config.spft_config import SpftConfig
from ..distributed.processes import sum_over_processes
from ..tuner.layer import SpftLinear
from .class_column import RowClasses


@dataclass(frozen=True)
class CalibrationBatch:
    """The data of one optimizer step on this process.

    Attributes:
        run: computes the loss, with True also its backward; returns the loss, whose mean over the
            processes is the loss of the global batch. It may be called as often as needed.
        micro_batches: the model inputs of each accumulation step, where they are known.
    """

    run: Callable[[bool], torch.Tensor]
    micro_batches: Sequence[Mapping] = ()


def wide_dtype(device: torch.device) -> torch.dtype:
    """What long sums are kept in, so that their order does not matter; MPS has no fp64."""
    return torch.float32 if device.type == "mps" else torch.float64


def chunks(x_TO: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Runs of tokens that are made fp32 at a time, which bounds the memory that this takes.

    1 MiB on a CPU, where sums are fastest in its cache, 64 MiB elsewhere, where each kernel costs.
    """
    elements = 2**18 if x_TO.device.type == "cpu" else 2**24
    return x_TO.split(max(1, elements // x_TO.shape[-1]))


class ImportanceMetric(ABC):
    """Scores the output neurons of the given layers.

    A metric is used once. For each of `passes()`: `attached(layers)` around `observe` for every
    calibration batch. Then `scores`.

    The calibration batches are dealt in turn to `parts` parts, whose sums are kept apart, so that
    the scores of either half of the data can be had as well as those of all.

    Attributes:
        needs_data: whether `observe` must be called at all.
        needs_gradients: whether batches must be run with their backward.
        needs_classes: whether batches must carry the class of every row.
        layers: layer name -> layer.
        parts: in how many parts the sums are kept.
        batches: how many batches each part has taken in.
        row_classes: holds the classes of the rows that the model is working on, where batches
            carry them; put here by the calibration before the first batch.
    """

    needs_data: bool = True
    needs_gradients: bool = False
    needs_classes: bool = False
    row_classes: RowClasses | None = None

    def __init__(
        self, layers: dict[str, SpftLinear], config: SpftConfig, model: nn.Module | None = None
    ) -> None:
        """
        Args:
            model: what the batches are run through.
        """
        self.layers = layers
        self.config = config
        self.model = model
        self.parts = 2 if self.needs_data and config.stability else 1
        self.batches = [0] * self.parts

    def passes(self) -> list[list[str]]:
        """Groups of layers, each of which needs a pass over all batches of its own."""
        return [list(self.layers)]

    def attached(self, names: list[str]) -> AbstractContextManager:
        """Whatever must be in place while batches run; undone on exit, whatever happens."""
        return nullcontext()

    def begin_pass(self, names: list[str]) -> None:
        """Start to take in all batches, for the layers `names`."""
        self.batches = [0] * self.parts

    def observe(self, batch: CalibrationBatch) -> None:
        """Take in one calibration batch."""
        part = sum(self.batches) % self.parts
        self._observe(batch, part)
        self.batches[part] += 1

    def _observe(self, batch: CalibrationBatch, part: int) -> None:
        raise NotImplementedError

    def end_pass(self) -> None:  # noqa: B027 (not all have something to do)
        """All batches have been taken in."""

    def scores(self, parts: Iterable[int] | None = None) -> dict[str, torch.Tensor]:
        """Layer name -> float64 (d_out,) on the CPU, the same on all processes.

        Args:
            parts: those whose batches count; all by default.
        """
        return self._scores(tuple(range(self.parts)) if parts is None else tuple(parts))

    @abstractmethod
    def _scores(self, parts: tuple[int, ...]) -> dict[str, torch.Tensor]: ...

    def _batches_in(self, parts: tuple[int, ...]) -> int:
        return max(1, sum(self.batches[part] for part in parts))

    def silent_layers(self) -> list[str]:
        """Layers that the data never reached, so that their scores say nothing."""
        return []

    def _unreached(self, passes: dict[str, torch.Tensor]) -> list[str]:
        """Layers that no process has seen pass, from this process's counts."""
        return [name for name, count in sum_over_processes(passes).items() if not count.any()]

    def warnings(self) -> list[str]:
        """Lines about scores that should not be trusted."""
        return []

    def diagnostics(self) -> dict[str, object]:
        """Further findings for the report: plain numbers, strings, lists and dicts."""
        return {}

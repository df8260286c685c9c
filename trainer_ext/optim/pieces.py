"""A parameter's update as the kernels see it, and the ranges that bound their temporaries."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

# Elements that are held in an fp32 copy at a time; a multiple of the 8-bit block.
PIECE_ELEMENTS = 2**24


@dataclass(frozen=True)
class Update:
    """One step of one parameter, in plain tensors: of a DTensor, this process's own part.

    Attributes:
        value: what is written in place.
        grad: its gradient, of the same shape and dtype.
        state: moments, of the same shape, and the counter `step` before this step.
        step: number of this step, from 1; None for the kernels that count by themselves.
        position: of the parameter in the optimizer's groups, counted through.
    """

    value: torch.Tensor
    grad: torch.Tensor
    state: dict[str, torch.Tensor]
    step: int | None
    position: int

    def key(self, group: Mapping[str, Any], first: int) -> tuple:
        """What the random bits of the range from element `first` on are a function of."""
        return group["seed"], self.step, self.position, first


def ranges(count: int) -> Iterator[tuple[int, int]]:
    """Consecutive (first, last + 1) of at most PIECE_ELEMENTS that cover `count` elements."""
    for first in range(0, count, PIECE_ELEMENTS):
        yield first, min(first + PIECE_ELEMENTS, count)

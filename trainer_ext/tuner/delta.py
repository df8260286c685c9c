"""NeuronDelta: the compact trained update of one layer's neurons, and what it is added to."""

from __future__ import annotations

import torch
from torch import nn

from ..errors import SpftError
from .functional import (
    add_selected_outputs,
    overwrite_selected_outputs,
    replace_selected_outputs,
)
from .marks import mark_trained


class NeuronDelta(nn.Module):
    """Trainable update of the selected neurons of one layer, for one adapter.

    Attributes:
        weight: (r, d_in), what is added to the selected rows; zero at the start.
        index: int64 (r,), the selected rows, ascending. Valid but meaningless until selected.
        selected: bool (), whether the index has been chosen. It is saved with the adapter.
        anchor: (r, d_in), what the neurons start from instead of the base's own rows, or None. It
            is frozen, keeps its dtype, and is meaningless until selected.
    """

    def __init__(self, r: int, d_in: int, anchor_dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(r, d_in))
        mark_trained(self.weight)
        self.register_buffer("index", torch.arange(r, dtype=torch.int64))
        self.register_buffer("selected", torch.tensor(False))
        anchor = None if anchor_dtype is None else torch.zeros(r, d_in, dtype=anchor_dtype)
        self.register_buffer("anchor", anchor)
        self._read_selected: tuple[torch.Tensor | None, int, bool] = (None, -1, False)

    @property
    def held_weight(self) -> nn.Parameter:
        """`weight` as this process holds it, to look at, not to compute with.

        In a forward, ZeRO-3 gathers what is asked for as an attribute.
        """
        return self._parameters.get("weight")

    @property
    def held_index(self) -> torch.Tensor:
        """`index`, without the search through a module's attributes."""
        return self._buffers["index"]

    @property
    def saved_buffers(self) -> list[str]:
        """Names of the buffers that are saved with the adapter, the same on every process."""
        return [name for name, buffer in self._buffers.items() if buffer is not None]

    @property
    def is_selected(self) -> bool:
        """`selected` as a Python bool, read from the device only when the buffer has changed.

        Every loader fills buffers in its own way, so the buffer itself is what counts.
        """
        buffer, version, value = self._read_selected
        if buffer is not self.selected or version != self.selected._version:
            value = bool(self.selected)
            self._read_selected = (self.selected, self.selected._version, value)
        return value

    def _apply(self, fn, recurse: bool = True):
        buffers = {name: getattr(self, name) for name in self.saved_buffers}
        super()._apply(fn, recurse)
        for name, buffer in buffers.items():
            moved = getattr(self, name)
            # A base without values, which FSDP's loading by one process makes, is no reason to
            # forget which neurons are selected.
            if moved.is_meta:
                setattr(self, name, buffer)
            elif moved.dtype != buffer.dtype:  # an anchor is held exactly
                setattr(self, name, buffer.to(moved.device))
        return self

    def _load_from_state_dict(self, state_dict, prefix, *args):
        saved = state_dict.get(f"{prefix}anchor")
        if saved is not None and self.anchor is not None:
            self.anchor = self.anchor.to(saved.dtype)
        elif self.anchor is not None and f"{prefix}selected" in state_dict:
            raise SpftError(
                f"the adapter's file has no {prefix}anchor, without which its neurons start from "
                "nothing; load another checkpoint"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def forward(
        self, y: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Put the update into the base layer's output y, in place; x is its input.

        A module's own forward, so that engines that shard `weight` gather it for this call.

        Args:
            bias: (d_out,) of the base layer, which an anchor's outputs need.
        """
        if self.anchor is None:
            return add_selected_outputs(y, x, self.weight, self.index)
        return replace_selected_outputs(
            y, x, self.weight, self.anchor, self.index, bias, self.selected
        )

    def start(
        self, y: torch.Tensor, x: torch.Tensor, bias: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Put what the neurons started from into y, in place, without the update."""
        if self.anchor is None:
            return y
        if torch.compiler.is_compiling():
            # a compiled graph may be older than the selection
            return overwrite_selected_outputs(
                y, x, self.anchor, self.index, bias, selected=self.selected
            )
        if not self.is_selected:
            return y
        return overwrite_selected_outputs(y, x, self.anchor, self.index, bias)

    def select(self, index: torch.Tensor, anchor: torch.Tensor | None = None) -> None:
        """Fill in which neurons the rows of `weight` belong to.

        Args:
            anchor: (r, d_in) what they start from, where the adapter has one.

        Raises:
            SpftError: the number of neurons differs from r, or they are not ascending and distinct.
        """
        if index.shape != self.index.shape:
            raise SpftError(
                f"a selection of {tuple(index.shape)} neurons does not fit an adapter with "
                f"r = {self.index.numel()}; select with the adapter's own r"
            )
        if bool((index.diff() <= 0).any()) or bool((index < 0).any()):
            raise SpftError("a selection must hold distinct neurons in ascending order")
        if self.anchor is not None:
            self.anchor = anchor.to(self.anchor.device, copy=True).contiguous()
        self.index.copy_(index)
        self.selected.fill_(True)

"""Where the `cuda` tests run, and watches over what happens there."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import TorchDispatchMode

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# What a process cannot go on without: values on the device that Python asks for, and sizes that
# depend on values.
_READS = ("_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select")


class OperatorNames(TorchDispatchMode):
    """Notes the names of all operators below autograd, as `_scaled_dot_product_attention_math`."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(_name(function))
        return function(*args, **(kwargs or {}))


class HostWaitsError(Exception):
    """The host has asked for a value of the device."""


class NoHostReads(TorchDispatchMode):
    """Refuses every operator that makes the host wait for a value of the device.

    Args:
        counters: tensors that are kept on the host and may be read there.
    """

    def __init__(self, counters=()) -> None:
        super().__init__()
        self._counters = {counter.data_ptr() for counter in counters}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, first = _name(function), args[0] if args else None
        reads = name in _READS and first.data_ptr() not in self._counters
        if reads or (name.startswith("index") and _has_mask(args[1])):
            raise HostWaitsError(f"{name} of a tensor of shape {tuple(first.shape)}")
        out = function(*args, **(kwargs or {}))
        if torch.is_tensor(out) and torch.is_tensor(first) and first.is_cuda and not out.is_cuda:
            raise HostWaitsError(f"{name} brings a tensor of shape {tuple(out.shape)} to the host")
        return out


def _has_mask(index) -> bool:
    """Whether an index is a mask, whose positions are looked for on the device."""
    return isinstance(index, list | tuple) and any(
        torch.is_tensor(i) and i.dtype in (torch.bool, torch.uint8) for i in index
    )


def _name(function) -> str:
    return function.overloadpacket.__name__


def far(a: torch.Tensor, b: torch.Tensor) -> float:
    """The norm of the difference as a share of the second's, in fp64 on the CPU."""
    a, b = a.detach().cpu().double(), b.detach().cpu().double()
    return ((a - b).norm() / b.norm()).item()

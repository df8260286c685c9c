"""Peak memory of a piece of work, above what was there before it, on any device."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class StorageTracker(TorchDispatchMode):
    """Counts the bytes of the tensor storages that operators make inside this mode.

    Views and in-place results count once, with their storage. What is alive at entry counts as
    nothing, and so does the scratch memory that a kernel takes and gives back by itself.

    Attributes:
        live_bytes: bytes of the storages made so far and still alive.
        peak_bytes: the highest that `live_bytes` has been.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live_bytes = 0
        self.peak_bytes = 0
        self._counted: dict[int, int] = {}  # storage address -> bytes counted for it
        self._finalizers: list[weakref.finalize] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self._look((args, kwargs), made_here=False)
        result = func(*args, **kwargs)
        self._look(result, made_here=True)
        return result

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)
        for finalizer in self._finalizers:
            finalizer.detach()

    def _look(self, tree: Any, made_here: bool) -> None:
        for tensor in tree_leaves(tree):
            if not isinstance(tensor, torch.Tensor):
                continue
            for storage in _storages(tensor):
                # The address names a storage only while it lives, hence a finalizer for each.
                address = storage._cdata
                if address not in self._counted:
                    # An operand that no operator here has made was there before.
                    self._counted[address] = storage.nbytes() if made_here else 0
                    self._finalizers.append(weakref.finalize(storage, self._forget, address))
                    self.live_bytes += self._counted[address]
        self.peak_bytes = max(self.peak_bytes, self.live_bytes)

    def _forget(self, address: int) -> None:
        self.live_bytes -= self._counted.pop(address)


def _tensors(tree: Any) -> Iterator[torch.Tensor]:
    """The tensors in containers and dataclasses."""
    for value in tree_leaves(tree):
        if isinstance(value, torch.Tensor):
            yield value
        elif dataclasses.is_dataclass(value) and not isinstance(value, type):
            yield from _tensors(vars(value))


def _storages(tensor: torch.Tensor) -> list[torch.UntypedStorage]:
    """Where a tensor's data lies."""
    if tensor.layout is torch.sparse_coo:
        return [tensor._indices().untyped_storage(), tensor._values().untyped_storage()]
    return [tensor.untyped_storage()]


def held_bytes(model: nn.Module) -> int:
    """Bytes of all tensors that the model's modules hold; shared ones count once.

    These are parameters, buffers and what layers keep beside them, such as SHiRA's indices and the
    pretrained rows of SPFT's written layers.
    """
    storages = {
        storage._cdata: storage.nbytes()
        for module in model.modules()
        for tensor in _tensors(vars(module))
        for storage in _storages(tensor)
    }
    return sum(storages.values())


def peak_bytes_above_start(work: Callable[[], object], device: torch.device) -> int:
    """Run `work` once; by how many bytes it raised memory at its highest.

    On CUDA this is the allocator's own figure, with the scratch memory of its kernels. The CPU
    allocator keeps none, and the process's resident memory is shared with everything else in it,
    so there it is the sum over tensors that `StorageTracker` sees.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        work()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - start
    with StorageTracker() as tracker:
        work()
    return tracker.peak_bytes

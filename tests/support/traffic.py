"""Counts what a process hands to torch.distributed, whoever calls it.

Every collective passes through the dispatcher as an operator of `c10d` or `_c10d_functional`:
those of Python code, of DDP's reducer (which calls the process group from C++), of FSDP2 and of
DeepSpeed. A dispatch mode sees their tensors. It sees the thread that entered it and its autograd,
which on a CPU is every thread that communicates.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operator -> (kind, the argument whose bytes are the payload). The payload is the whole tensor that
# the processes have together: what all of them get of a gather, what each puts into a reduction.
_C10D = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
    "allgather_": ("all_gather", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_coalesced_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "reduce_scatter_": ("reduce_scatter", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "gather_": ("gather", 0),
    "scatter_": ("scatter", 1),
    "alltoall_": ("all_to_all", 1),
    "alltoall_base_": ("all_to_all", 1),
    "send": ("send", 0),
    "recv_": ("recv", 0),
    "recv_any_source_": ("recv", 0),
    "barrier": ("barrier", None),
    "monitored_barrier_": ("barrier", None),
}
_RESULT = -1  # the payload is what the operator returns
_FUNCTIONAL = {
    "all_reduce": ("all_reduce", 0),
    "all_reduce_": ("all_reduce", 0),
    "all_reduce_coalesced": ("all_reduce", 0),
    "all_reduce_coalesced_": ("all_reduce", 0),
    "all_gather_into_tensor": ("all_gather", _RESULT),
    "all_gather_into_tensor_out": ("all_gather", _RESULT),
    "all_gather_into_tensor_coalesced": ("all_gather", _RESULT),
    "reduce_scatter_tensor": ("reduce_scatter", 0),
    "reduce_scatter_tensor_out": ("reduce_scatter", 0),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", 0),
    "all_to_all_single": ("all_to_all", 0),
    "broadcast": ("broadcast", 0),
    "broadcast_": ("broadcast", 0),
}
_NO_TRAFFIC = ("wait_tensor", "_wrap_tensor_autograd", "check_for_nan")
_PICKLED = ("all_gather", "uint8")
_KINDS = {"c10d": _C10D, "_c10d_functional": _FUNCTIONAL}


@dataclass(frozen=True)
class Collective:
    """One call: its kind, the payload's bytes, and the dtype of its elements."""

    kind: str
    nbytes: int
    dtype: str


class Traffic(TorchDispatchMode):
    """Notes the collectives that this process takes part in inside this mode.

    Attributes:
        calls: all of them, in order.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Collective] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            # They communicate inside their operators. They must go first, or the mode, which is
            # off while an operator runs, would not see it.
            return NotImplemented
        # That it is off keeps what a functional collective calls from being counted again.
        result = func(*args, **(kwargs or {}))
        kinds = _KINDS.get(func.namespace)
        if kinds is not None:
            self._note(kinds, func._schema.name.split("::")[1], args, result)
        return result

    def _note(self, kinds: dict, name: str, args: tuple, result) -> None:
        if name in _NO_TRAFFIC:
            return
        kind, place = kinds[name]  # a KeyError says that the table lacks an operator
        tree = [] if place is None else result if place == _RESULT else args[place]
        tensors = [t for t in tree_leaves(tree) if isinstance(t, torch.Tensor)]
        nbytes = sum(t.numel() * t.element_size() for t in tensors)
        dtypes = {str(t.dtype).removeprefix("torch.") for t in tensors}
        self.calls.append(Collective(kind, nbytes, ",".join(sorted(dtypes))))


def bytes_by_kind(calls: list[Collective]) -> dict[str, int]:
    """Payload bytes of each kind of collective; barriers, which carry none, are left out."""
    total: Counter[str] = Counter()
    for call in calls:
        total[call.kind] += call.nbytes
    return {kind: nbytes for kind, nbytes in total.items() if nbytes}


def object_exchanges(calls: list[Collective]) -> tuple[list[Collective], list[Collective]]:
    """The calls without those of `all_gather_object`, and the latter: sizes, then pickled bytes."""
    numbers = [n for n, call in enumerate(calls) if (call.kind, call.dtype) == _PICKLED]
    taken = {*numbers, *(n - 1 for n in numbers)}
    return (
        [call for n, call in enumerate(calls) if n not in taken],
        [call for n, call in enumerate(calls) if n in taken],
    )

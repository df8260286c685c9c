"""Whether all processes of a run hold the same: settings by value, tensors by their bits."""

from __future__ import annotations

import socket
from collections import Counter
from collections.abc import Iterable, Mapping

import torch
import torch.distributed as dist

from ..distributed.processes import world_size
from ..errors import SpftError

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_CHUNK = 2**16  # elements whose int64 copies exist at a time
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64  # 2^64 over the golden ratio: odd, so it loses no bit
_NAMED = 4  # ranks that a message names one by one
Fact = str | int | float | bool | None


def check_agreement(
    facts: Mapping[str, Fact],
    mend: str = "start all processes with the same files and versions",
) -> None:
    """Compare small facts over all processes, all of which must ask; one exchange.

    The value of most processes counts as the right one, that of rank 0 where they are even.

    Args:
        facts: name -> value; fields of SpftConfig have their names in backticks.

    Raises:
        SpftError: on every process alike. Names the ranks that differ, the first fact that they
            differ in, and both values.
    """
    if world_size() == 1:
        return
    host, rows = socket.gethostname(), [None] * world_size()
    dist.all_gather_object(rows, (host, dict(facts)))
    names = list(dict.fromkeys(name for _, row in rows for name in row))
    differing = [name for name in names if len({_value(row, name) for _, row in rows}) > 1]
    if not differing:
        return
    name, *more = differing
    values = [_value(row, name) for _, row in rows]
    right, wrong = _dissenters(rows, values)
    there = values[min(wrong)]
    also = f" (and {', '.join(more[:3])})" if more else ""
    raise SpftError(
        f"{name_ranks(wrong)} {'disagrees' if len(wrong) == 1 else 'disagree'}: {name} is {there} "
        f"there and {right} on the others{also}; {mend}"
    )


def check_same_values(tensors: Mapping[str, torch.Tensor], step: int) -> None:
    """Compare tensors that every process should hold bit for bit alike; all must ask.

    Each process sends 8 bytes a tensor. Under DDP and ZeRO-1/2 the trained values are the same
    bits everywhere; where they are not, memory was corrupted or a process missed an update.

    Args:
        tensors: name of a layer -> what every process holds whole, on any device.
        step: the optimizer step, for the message.

    Raises:
        SpftError: on every process alike. Names the ranks that differ, and the tensor.
    """
    if world_size() == 1 or not tensors:
        return
    host, rows = socket.gethostname(), [None] * world_size()
    dist.all_gather_object(rows, (host, checksums(tensors.values())))
    for position, name in enumerate(tensors):
        values = [row[position] for _, row in rows]
        _, wrong = _dissenters(rows, values)
        if wrong:
            raise SpftError(
                f"{name_ranks(wrong)} {'holds' if len(wrong) == 1 else 'hold'} other values of "
                f"{name} than the others at step {step}, though all were trained alike: memory was "
                "corrupted there or an update was missed; go on from an earlier checkpoint, and "
                "check that machine"
            )


@torch.no_grad()
def checksums(tensors: Iterable[torch.Tensor]) -> list[int]:
    """A number for the bits of each tensor: any single change changes it, and a swap does but for
    one in about 2^30.

    It is the sum over the elements of their mixed bits times their odd position, modulo 2^64: the
    same on every device. One transfer for all tensors.
    """
    sums = [_bit_sum(tensor.detach()) for tensor in tensors]
    return torch.stack([s.to(sums[0].device) for s in sums]).tolist() if sums else []


def name_ranks(hosts: Mapping[int, str]) -> str:
    """`rank 3 (host b)`, or several of them."""
    named = [f"{rank} ({host})" if host else str(rank) for rank, host in sorted(hosts.items())]
    more = len(named) - _NAMED
    if more > 0:
        named = [*named[:_NAMED], f"{more} more"]
    *first, last = named
    return f"ranks {', '.join(first)} and {last}" if first else f"rank {last}"


def _bit_sum(tensor: torch.Tensor) -> torch.Tensor:
    """int64 () on the tensor's device; nothing waits for the device."""
    bits = tensor.contiguous().view(-1).view(_INTEGERS[tensor.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=tensor.device)
    size = min(_CHUNK, bits.numel())
    odd = 2 * torch.arange(size, device=tensor.device) + 1  # odd factors lose no bit modulo 2^64
    buffer = torch.empty_like(odd)
    for start in range(0, bits.numel(), _CHUNK):
        part = bits[start : start + _CHUNK]
        wide = _mixed_(buffer[: part.numel()].copy_(part))
        total += 2 * start * wide.sum()
        total += wide.mul_(odd[: part.numel()]).sum()
    return total


def _mixed_(bits: torch.Tensor) -> torch.Tensor:
    """Spread the bits of int64 numbers over all of theirs, in place; no two come to the same.

    Without it, numbers that differ in their highest bits alone, as powers of 2 do, could be swapped
    without a trace.
    """
    bits.mul_(_GOLDEN)
    return bits.bitwise_xor_(bits.bitwise_right_shift(32).bitwise_and_(2**32 - 1)).mul_(_GOLDEN)


def _value(row: Mapping[str, Fact], name: str) -> str:
    return str(row[name]) if name in row else "missing"


def _dissenters(rows: list, values: list) -> tuple[object, dict[int, str]]:
    """The value that occurs most often, and rank -> host of those that have another.

    Among equally frequent ones it is the first, which is rank 0's if that is one of them.
    """
    right = Counter(values).most_common(1)[0][0]
    return right, {rank: rows[rank][0] for rank, value in enumerate(values) if value != right}

"""AdamW steps of bf16 and fp16 tensors: computed in fp32 copies and rounded back."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.optim.adamw import adamw

from ..seeding import generator_for

HALF = (torch.bfloat16, torch.float16)
MOMENTS = ("exp_avg", "exp_avg_sq")
# Elements that are held in an fp32 copy at a time; a multiple of the 8-bit block.
PIECE_ELEMENTS = 2**24
# The mantissa bits that fp32 has and bf16 has not.
DROPPED_BITS = 16


def is_fused(group: Mapping[str, Any], value: torch.Tensor) -> bool:
    """Whether the fused kernel steps a tensor: as the group says, else wherever there is one."""
    if group["foreach"] is None and group["fused"] is None:
        plain = type(value) in (torch.Tensor, torch.nn.Parameter) and value.is_contiguous()
        return plain and value.device.type in ("cpu", "cuda")
    return bool(group["fused"])


class Update(NamedTuple):
    """One step of a parameter, or of a range of its elements, in plain tensors.

    Attributes:
        value: is written in place.
        grad: its gradient, of the same shape and dtype.
        state: its moments, of the same shape; a whole parameter's also holds counter and maxima.
        step: number of this step, from 1.
        position: of the parameter in the optimizer's groups, counted through.
        first: number of the range's first element in the flattened parameter.
    """

    value: torch.Tensor
    grad: torch.Tensor
    state: dict[str, torch.Tensor]
    step: int
    position: int
    first: int = 0

    def pieces(self) -> Iterator[Update]:
        """Flat ranges of at most PIECE_ELEMENTS; the whole if a tensor is not contiguous."""
        tensors = (self.value, self.grad, *(self.state[moment] for moment in MOMENTS))
        if not all(tensor.is_contiguous() for tensor in tensors):
            yield self
            return
        for first in range(0, self.value.numel(), PIECE_ELEMENTS):
            value, grad, *moments = (
                tensor.view(-1)[first : first + PIECE_ELEMENTS] for tensor in tensors
            )
            state = dict(zip(MOMENTS, moments, strict=True))
            yield self._replace(value=value, grad=grad, state=state, first=first)

    def write_back(self, values: torch.Tensor, group: Mapping[str, Any]) -> None:
        """Round fp32 values, which serve as scratch, into a 16-bit `value`."""
        key = (group["seed"], self.step, self.position, self.first)
        write_back_(self.value, values, key, group["stochastic_rounding"])


def step_half_(updates: Sequence[Update], group: Mapping[str, Any]) -> None:
    """Step bf16 and fp16 parameters with fp32 moments by torch's kernels, in place."""
    beta1, beta2 = group["betas"]
    for bucket in _buckets(updates):
        values = [piece.value.float() for piece in bucket]
        grads = [piece.grad.float() for piece in bucket]
        fused = is_fused(group, values[0])
        # counters of this step alone, where the kernel wants them: one copy, which nobody waits for
        counters = torch.tensor([piece.step - 1.0 for piece in bucket], dtype=torch.float32)
        device = values[0].device if fused else "cpu"
        adamw(
            values,
            grads,
            [piece.state["exp_avg"] for piece in bucket],
            [piece.state["exp_avg_sq"] for piece in bucket],
            [],
            list(counters.to(device, non_blocking=True).unbind()),
            foreach=group["foreach"],
            fused=fused or group["fused"],
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        del grads
        for piece in bucket:  # each copy is given back as soon as it is written
            piece.write_back(values.pop(0), group)
    for update in updates:
        update.state["step"].fill_(update.step)


def _buckets(updates: Iterable[Update]) -> Iterator[list[Update]]:
    """Pieces that are stepped together: of one device, at most PIECE_ELEMENTS in all."""
    bucket: list[Update] = []
    elements = 0
    for piece in itertools.chain.from_iterable(update.pieces() for update in updates):
        full = elements + piece.value.numel() > PIECE_ELEMENTS
        if bucket and (full or bucket[0].value.device != piece.value.device):
            yield bucket
            bucket, elements = [], 0
        bucket.append(piece)
        elements += piece.value.numel()
    if bucket:
        yield bucket


def random_bits(shape: torch.Size, key: tuple, device: torch.device) -> torch.Tensor:
    """Int32 in [0, 2**16), a function of `key` and the device's type alone.

    The key is (seed, step, position of the parameter, number of its first element here). The
    global random state is neither read nor changed.
    """
    generator = generator_for("stochastic rounding", *key, device=device)
    return torch.randint(
        2**DROPPED_BITS, shape, dtype=torch.int32, device=device, generator=generator
    )


def round_stochastically_(target: torch.Tensor, values: torch.Tensor, key: tuple) -> None:
    """Write fp32 values into a bf16 tensor, each rounded to one of its two neighbours.

    The pattern of an fp32 number, plus as many random units as the dropped bits count, is cut off:
    it carries into the kept bits with the probability (dropped bits) / 2**16, which is the share of
    the way to the neighbour away from zero. Numbers that bf16 holds exactly, infinities and NaN
    stay what they are.

    Args:
        target: bf16, of the shape of `values`; is overwritten.
        values: fp32; serve as scratch.
        key: see `random_bits`.
    """
    nan = values.isnan()
    pattern = values.view(torch.int32)
    pattern.add_(random_bits(values.shape, key, values.device))
    pattern.bitwise_and_(-(2**DROPPED_BITS))
    target.copy_(values)
    target.masked_fill_(nan, torch.nan)  # the sum may have carried a NaN into the sign


def write_back_(target: torch.Tensor, values: torch.Tensor, key: tuple, stochastic: bool) -> None:
    """Round fp32 values, which serve as scratch, into a 16-bit tensor.

    bf16 is rounded at random if `stochastic` is set, else to nearest. fp16 is always rounded to
    nearest: its 10 bits of mantissa seldom lose a whole update.
    """
    if stochastic and target.dtype == torch.bfloat16:
        round_stochastically_(target, values, key)
    else:
        target.copy_(values)

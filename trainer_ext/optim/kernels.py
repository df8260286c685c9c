"""AdamW steps with 32-bit moments by torch's own kernels: in place, or in an fp32 copy."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch.optim.adamw import adamw

from . import pieces
from .pieces import Update, ranges
from .stochastic_rounding import write_back_

FUSED_DEVICES = ("cpu", "cuda")
HALF = (torch.bfloat16, torch.float16)


def is_fused(group: Mapping[str, Any], value: torch.Tensor) -> bool:
    """Whether the fused kernel steps this tensor: as the group says, else wherever there is one."""
    if group["foreach"] is None and group["fused"] is None:
        plain = type(value) in (torch.Tensor, torch.nn.Parameter) and value.is_contiguous()
        return plain and value.device.type in FUSED_DEVICES
    return bool(group["fused"])


def update_full_(updates: Sequence[Update], group: Mapping[str, Any]) -> None:
    """Step fp32 and fp64 tensors in place; the same bits as torch.optim.AdamW with these flags."""
    for fused in (True, False):
        chosen = [u for u in updates if is_fused(group, u.value) == fused]
        if chosen:
            _adamw(
                group,
                [u.value for u in chosen],
                [u.grad for u in chosen],
                [u.state["exp_avg"] for u in chosen],
                [u.state["exp_avg_sq"] for u in chosen],
                [u.state["step"] for u in chosen],
                fused,
            )


class _Piece(NamedTuple):
    value: torch.Tensor
    grad: torch.Tensor
    exp_avg: torch.Tensor
    exp_avg_sq: torch.Tensor
    step: int
    key: tuple


def update_half_(updates: Sequence[Update], group: Mapping[str, Any]) -> None:
    """Step bf16 and fp16 tensors, fp32 moments: in fp32 copies of a bounded size, rounded back."""
    for bucket in _buckets(updates, group):
        values = [piece.value.float() for piece in bucket]
        grads = [piece.grad.float() for piece in bucket]
        fused = is_fused(group, values[0])
        # counters of this step alone, where the kernel wants them: one copy, which nobody waits for
        counters = torch.tensor([piece.step - 1.0 for piece in bucket], dtype=torch.float32)
        device = values[0].device if fused else "cpu"
        steps = counters.to(device, non_blocking=True).unbind()
        exp_avgs = [piece.exp_avg for piece in bucket]
        exp_avg_sqs = [piece.exp_avg_sq for piece in bucket]
        _adamw(group, values, grads, exp_avgs, exp_avg_sqs, list(steps), fused)
        del grads
        for piece in bucket:  # each copy is given back as soon as it is written
            write_back_(piece.value, values.pop(0), piece.key, group["stochastic_rounding"])


def _buckets(updates: Sequence[Update], group: Mapping[str, Any]) -> Iterator[list[_Piece]]:
    """Pieces that are stepped together: of one device, at most PIECE_ELEMENTS in all."""
    bucket: list[_Piece] = []
    elements = 0
    for update in updates:
        for piece in _pieces(update, group):
            full = elements + piece.value.numel() > pieces.PIECE_ELEMENTS
            if bucket and (full or bucket[0].value.device != piece.value.device):
                yield bucket
                bucket, elements = [], 0
            bucket.append(piece)
            elements += piece.value.numel()
    if bucket:
        yield bucket


def _pieces(update: Update, group: Mapping[str, Any]) -> Iterator[_Piece]:
    tensors = (update.value, update.grad, update.state["exp_avg"], update.state["exp_avg_sq"])
    if not all(tensor.is_contiguous() for tensor in tensors):
        yield _Piece(*tensors, update.step, update.key(group, 0))
        return
    flat = [tensor.view(-1) for tensor in tensors]
    for first, last in ranges(update.value.numel()):
        parts = (tensor[first:last] for tensor in flat)
        yield _Piece(*parts, update.step, update.key(group, first))


def _adamw(group, values, grads, exp_avgs, exp_avg_sqs, steps, fused: bool) -> None:
    beta1, beta2 = group["betas"]
    by_default = group["foreach"] is None and group["fused"] is None
    adamw(
        values,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        steps,
        foreach=group["foreach"],
        fused=(True if fused else None) if by_default else group["fused"],
        amsgrad=False,
        beta1=beta1,
        beta2=beta2,
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        maximize=False,
    )

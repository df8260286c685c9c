"""AdamW moments in 8 bits, quantised in blocks of 256 by bitsandbytes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import SpftError
from .pieces import Update, ranges
from .stochastic_rounding import write_back_

BLOCK = 256  # the only size that bitsandbytes' optimizer kernels know
MIN_ELEMENTS = 4096  # smaller tensors keep fp32 moments, as bitsandbytes' optimizers do


def bitsandbytes_functional():
    """The module `bitsandbytes.functional`, imported at first use.

    Raises:
        SpftError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise SpftError(
            f"state_bits is 8 but bitsandbytes cannot be imported ({error}); "
            "`pip install bitsandbytes`, or use state_bits=32"
        ) from error
    return bitsandbytes.functional


@functools.cache
def codebooks(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """The 256 values that a moment's codes stand for: signed (exp_avg), unsigned (exp_avg_sq).

    Dynamic tree quantisation (Dettmers et al. 2022, 8-bit Optimizers via Block-wise Quantization).
    One copy a device serves all parameters and is in no state dict.
    """
    functional = bitsandbytes_functional()
    return (
        functional.create_dynamic_map(signed=True).to(device),
        functional.create_dynamic_map(signed=False).to(device),
    )


def new_moments(value: torch.Tensor) -> dict[str, torch.Tensor]:
    """Zero moments: uint8 codes of the parameter's shape, fp32 (ceil(numel / 256),) maxima."""
    blocks = -(-value.numel() // BLOCK)
    codes = {"dtype": torch.uint8, "device": value.device}
    maxima = {"dtype": torch.float32, "device": value.device}
    return {
        "exp_avg": torch.zeros(value.shape, **codes),
        "exp_avg_sq": torch.zeros(value.shape, **codes),
        "exp_avg_absmax": torch.zeros(blocks, **maxima),
        "exp_avg_sq_absmax": torch.zeros(blocks, **maxima),
    }


def update_8bit_(update: Update, group: Mapping[str, Any]) -> None:
    """One AdamW step of a tensor with 8-bit moments, in place, in ranges of whole blocks.

    16-bit parameters are updated in an fp32 copy of one range, which is rounded back.
    """
    kernel = bitsandbytes_functional().optimizer_update_8bit_blockwise
    (beta1, beta2), state = map(float, group["betas"]), update.state
    value, grad = update.value.reshape(-1), update.grad.reshape(-1)
    exp_avg, exp_avg_sq = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
    for first, last in ranges(value.numel()):
        blocks = slice(first // BLOCK, -(-last // BLOCK))
        target = value[first:last]
        fp32 = target.float()
        kernel(
            "adam",
            grad[first:last].float(),
            fp32,
            exp_avg[first:last],
            exp_avg_sq[first:last],
            beta1,
            beta2,
            0.0,  # beta3 and alpha are other optimizers'
            0.0,
            group["eps"],
            update.step,
            float(group["lr"]),
            *codebooks(value.device),
            state["exp_avg_absmax"][blocks],
            state["exp_avg_sq_absmax"][blocks],
            group["weight_decay"],
        )
        if target.dtype != torch.float32:
            write_back_(target, fp32, update.key(group, first), group["stochastic_rounding"])
    if not update.value.is_contiguous():
        update.value.copy_(value.view_as(update.value))

"""AdamW steps of tensors with moments in 8 bits, quantised in blocks of 256 by bitsandbytes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from ..errors import SpftError
from .half import Update

BLOCK = 256  # the only size that bitsandbytes' optimizer kernels know
MIN_ELEMENTS = 4096  # smaller tensors keep fp32 moments, as bitsandbytes' optimizers do


def has_8bit_moments(parameter: torch.Tensor, group: Mapping[str, Any]) -> bool:
    """Whether a parameter of this group has 8-bit moments."""
    return group["state_bits"] == 8 and parameter.numel() >= MIN_ELEMENTS


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


def new_8bit_moments(parameter: torch.Tensor) -> dict[str, torch.Tensor]:
    """Zero moments: uint8 codes of the parameter's shape, fp32 (ceil(numel / 256),) maxima.

    Raises:
        SpftError: the parameter is a DTensor or fp64.
    """
    shape = tuple(parameter.shape)
    if isinstance(parameter, DTensor):
        raise SpftError(
            f"state_bits is 8 but the parameter of shape {shape} is a DTensor (FSDP2), whose "
            "shards the blocks of 8-bit moments would not follow into checkpoints; use "
            "state_bits=32 (optimizer adamw_torch)"
        )
    if parameter.dtype == torch.float64:
        raise SpftError(
            f"state_bits is 8 but the parameter of shape {shape} is fp64; use state_bits=32"
        )
    blocks = -(-parameter.numel() // BLOCK)
    codes = {"dtype": torch.uint8, "device": parameter.device}
    maxima = {"dtype": torch.float32, "device": parameter.device}
    return {
        "exp_avg": torch.zeros(shape, **codes),
        "exp_avg_sq": torch.zeros(shape, **codes),
        "exp_avg_absmax": torch.zeros(blocks, **maxima),
        "exp_avg_sq_absmax": torch.zeros(blocks, **maxima),
    }


def step_8bit_(update: Update, group: Mapping[str, Any]) -> None:
    """Step a parameter with 8-bit moments by bitsandbytes' kernel, in place, piece by piece.

    16-bit pieces are stepped in an fp32 copy, which is rounded back.
    """
    kernel = bitsandbytes_functional().optimizer_update_8bit_blockwise
    beta1, beta2 = map(float, group["betas"])
    plain = update._replace(value=update.value.contiguous(), grad=update.grad.contiguous())
    for piece in plain.pieces():
        blocks = slice(piece.first // BLOCK, -(-(piece.first + piece.value.numel()) // BLOCK))
        fp32 = piece.value.float()
        kernel(
            "adam",
            piece.grad.float(),
            fp32,
            piece.state["exp_avg"].view(-1),
            piece.state["exp_avg_sq"].view(-1),
            beta1,
            beta2,
            0.0,  # beta3 and alpha are other optimizers'
            0.0,
            group["eps"],
            piece.step,
            float(group["lr"]),
            *codebooks(fp32.device),
            update.state["exp_avg_absmax"][blocks],
            update.state["exp_avg_sq_absmax"][blocks],
            group["weight_decay"],
        )
        if fp32.dtype != piece.value.dtype:
            piece.write_back(fp32, group)
    if not update.value.is_contiguous():
        update.value.copy_(plain.value)
    update.state["step"].fill_(update.step)

"""Rounding fp32 to bf16 up or down at random, so that the mean is the value itself."""

from __future__ import annotations

import torch

from ..seeding import generator_for

# The mantissa bits that fp32 has and bf16 has not.
DROPPED_BITS = 16


def random_bits(shape: torch.Size, key: tuple, device: torch.device) -> torch.Tensor:
    """Int32 in [0, 2**16), a function of `key` and the device's type alone.

    The global random state is neither read nor changed.

    Args:
        shape: of the result.
        key: what the numbers are for: (seed, step, position of the parameter, first element).
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
        target: bf16, of the shape of `values`; overwritten.
        values: fp32; used as scratch, its content is lost.
        key: see `random_bits`.
    """
    nan = values.isnan()
    pattern = values.view(torch.int32)
    pattern.add_(random_bits(values.shape, key, values.device))
    pattern.bitwise_and_(-(2**DROPPED_BITS))
    target.copy_(values)
    target.masked_fill_(nan, torch.nan)  # the sum may have carried a NaN into the sign


def write_back_(target: torch.Tensor, values: torch.Tensor, key: tuple, stochastic: bool) -> None:
    """Round fp32 values into a 16-bit tensor: bf16 at random if `stochastic`, else to nearest.

    fp16 is always rounded to nearest: its 10 bits of mantissa seldom lose a whole update.
    `values` is used as scratch.
    """
    if stochastic and target.dtype == torch.bfloat16:
        round_stochastically_(target, values, key)
    else:
        target.copy_(values)

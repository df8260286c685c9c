"""The readable twin of SelectedNeuronAdamW: one tensor at a time, the equations written out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer

from trainer_ext.optim import half
from trainer_ext.optim.block_8bit import BLOCK, MIN_ELEMENTS, bitsandbytes_functional, codebooks


class SelectedNeuronAdamWReference(Optimizer):
    """What SelectedNeuronAdamW computes, for tests and readers; same arguments, no kernels.

    State: `step` t, `exp_avg` m and `exp_avg_sq` v, and with 8 bits the maxima of their blocks.
    Parameters are plain tensors; any may be optimized, and nothing is checked.
    """

    def __init__(
        self,
        params: Iterable,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        state_bits: int = 32,
        stochastic_rounding: bool = True,
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        defaults |= {"state_bits": state_bits, "seed": seed}
        super().__init__(params, {**defaults, "stochastic_rounding": stochastic_rounding})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient; returns what the closure returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        position = 0  # of the parameter in all groups
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group, position)
                position += 1
        return loss

    def _update(self, parameter: torch.Tensor, group: dict[str, Any], position: int) -> None:
        lr, (beta1, beta2) = group["lr"], group["betas"]
        eps, decay = group["eps"], group["weight_decay"]
        state = self.state[parameter]
        eight_bit = group["state_bits"] == 8 and parameter.numel() >= MIN_ELEMENTS
        if not state:
            state.update(_zero_state(parameter, eight_bit))

        # All arithmetic in fp32, or fp64 for fp64 parameters.
        dtype = torch.promote_types(parameter.dtype, torch.float32)
        theta, g = parameter.to(dtype, copy=True), parameter.grad.to(dtype)
        m, v = _dequantised(state) if eight_bit else (state["exp_avg"], state["exp_avg_sq"])

        # t <- t + 1
        state["step"] += 1
        t = int(state["step"])
        # theta <- theta - lr lambda theta
        theta.mul_(1 - lr * decay)
        # m <- beta1 m + (1 - beta1) g
        m.lerp_(g, 1 - beta1)
        # v <- beta2 v + (1 - beta2) g^2
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        # theta <- theta - lr / (1 - beta1^t) * m / (sqrt(v / (1 - beta2^t)) + eps)
        denominator = (v.sqrt() / math.sqrt(1 - beta2**t)).add_(eps)
        theta.addcdiv_(m, denominator, value=-lr / (1 - beta1**t))

        if eight_bit:
            _requantise(state, m, v)
        if parameter.dtype == torch.bfloat16 and group["stochastic_rounding"]:
            theta = _rounded_stochastically(theta, (group["seed"], t, position))
        parameter.copy_(theta)  # to the nearest, where precision is lost


def _zero_state(parameter: torch.Tensor, eight_bit: bool) -> dict[str, torch.Tensor]:
    state = {"step": torch.tensor(0.0)}
    dtype = torch.uint8 if eight_bit else torch.promote_types(parameter.dtype, torch.float32)
    for moment in ("exp_avg", "exp_avg_sq"):
        state[moment] = torch.zeros_like(parameter, dtype=dtype)
        if eight_bit:
            blocks = math.ceil(parameter.numel() / BLOCK)
            state[f"{moment}_absmax"] = torch.zeros(blocks, device=parameter.device)
    return state


def _dequantised(state: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """x_i = absmax of i's block * codebook[code_i]."""
    return [
        bitsandbytes_functional().dequantize_blockwise(
            state[moment], absmax=state[f"{moment}_absmax"], code=codebook, blocksize=BLOCK
        )
        for moment, codebook in zip(
            ("exp_avg", "exp_avg_sq"), codebooks(state["exp_avg"].device), strict=True
        )
    ]


def _requantise(state: dict[str, torch.Tensor], m: torch.Tensor, v: torch.Tensor) -> None:
    """code_i = the entry nearest to x_i / absmax of i's block, as bitsandbytes finds it."""
    for moment, x, codebook in zip(
        ("exp_avg", "exp_avg_sq"), (m, v), codebooks(m.device), strict=True
    ):
        codes, quantisation = bitsandbytes_functional().quantize_blockwise(
            x, code=codebook, blocksize=BLOCK
        )
        state[moment].copy_(codes)
        state[f"{moment}_absmax"].copy_(quantisation.absmax)


def _rounded_stochastically(theta: torch.Tensor, key: tuple) -> torch.Tensor:
    """Each element's neighbour in bf16: the one away from zero with the share of the way to it."""
    pieces = torch.arange(theta.numel()).split(half.PIECE_ELEMENTS)
    bits = [half.random_bits(piece.shape, (*key, int(piece[0])), theta.device) for piece in pieces]
    u = torch.cat(bits).view(theta.shape)  # uniform in 0 .. 2^16 - 1
    # Patterns of fp32 numbers of one sign are ordered as their magnitudes, as int64 without wraps.
    pattern = theta.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    dropped = pattern & 0xFFFF
    towards_zero = pattern - dropped
    away = torch.where(u + dropped >= 0x10000, 0x10000, 0)
    rounded = (towards_zero + away).to(torch.int32).view(torch.float32)
    return torch.where(theta.isnan(), theta, rounded)

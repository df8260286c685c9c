"""What the hyperparameters of SelectedNeuronAdamW may be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from ..errors import SpftError
from .block_8bit import bitsandbytes_functional

STATE_BITS = (8, 32)
# Keys of torch.optim.AdamW's groups, held so that state dicts can be exchanged; nothing else works.
TORCH_KEYS = {
    "amsgrad": False,
    "maximize": False,
    "capturable": False,
    "differentiable": False,
    "decoupled_weight_decay": True,
}


def check_hyperparameters(group: Mapping[str, Any]) -> None:
    """Refuse values of a parameter group that have no meaning.

    Raises:
        SpftError: one is out of range, two exclude each other, or a package is missing.
    """
    for name in ("lr", "eps", "weight_decay"):
        if not 0.0 <= _number(name, group[name], may_be_tensor=name == "lr") < math.inf:
            raise SpftError(f"{name} is {group[name]}; it must be a finite number, 0 or greater")
    betas = group["betas"]
    if not isinstance(betas, tuple | list) or len(betas) != 2:
        raise SpftError(f"betas is {betas!r}; it must be two numbers, such as (0.9, 0.999)")
    for beta in betas:
        if not 0.0 <= _number("betas", beta) < 1.0:
            raise SpftError(f"betas is {tuple(betas)}; each must be in [0, 1)")
    _check_kernels(group)
    _check_storage(group)
    for key, only in TORCH_KEYS.items():
        if group.get(key, only) != only:
            raise SpftError(f"{key} is {group[key]!r}; SelectedNeuronAdamW has {key}={only} only")


def _check_kernels(group: Mapping[str, Any]) -> None:
    for name in ("foreach", "fused"):
        if group[name] not in (None, True, False):
            raise SpftError(f"{name} is {group[name]!r}; it must be True, False or None")
    if group["foreach"] and group["fused"]:
        raise SpftError("foreach and fused are both True; choose one, or neither for the fastest")
    if group["foreach"] and isinstance(group["lr"], torch.Tensor):
        raise SpftError("lr is a tensor, which the foreach kernel cannot read; pass a float")


def _check_storage(group: Mapping[str, Any]) -> None:
    if type(group["state_bits"]) is not int or group["state_bits"] not in STATE_BITS:
        raise SpftError(f"state_bits is {group['state_bits']!r}; it must be 8 or 32")
    if not isinstance(group["stochastic_rounding"], bool):
        raise SpftError(
            f"stochastic_rounding is {group['stochastic_rounding']!r}; it must be True or False"
        )
    if type(group["seed"]) is not int:
        raise SpftError(f"seed is {group['seed']!r}; it must be an integer")
    if group["state_bits"] == 8:
        bitsandbytes_functional()


def _number(name: str, value: Any, may_be_tensor: bool = False) -> float:
    if may_be_tensor and isinstance(value, torch.Tensor):
        if value.numel() != 1:
            shape = tuple(value.shape)
            raise SpftError(f"{name} is a tensor of shape {shape}; it must hold one number")
    elif isinstance(value, bool) or not isinstance(value, int | float):
        raise SpftError(f"{name} is {value!r}; it must be a number")
    return float(value)

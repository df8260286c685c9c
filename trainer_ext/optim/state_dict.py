"""What a state dict holds: hyperparameters of groups and state of parameters, new or loaded."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from ..distributed.shards import local_tensor
from ..errors import SpftError
from .block_8bit import bitsandbytes_functional, has_8bit_moments, new_8bit_moments
from .half import HALF, MOMENTS, is_fused

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
    for names, holds, rule in _RULES:
        for name in names:
            value = group[name]
            if name == "lr" and isinstance(value, torch.Tensor) and value.numel() == 1:
                value = value.item()
            if not holds(value):
                tensor = isinstance(value, torch.Tensor)
                seen = f"a tensor of shape {tuple(value.shape)}" if tensor else repr(value)
                raise SpftError(f"{name} is {seen}; it must be {rule}")
    if group["foreach"] and group["fused"]:
        raise SpftError("foreach and fused are both True; choose one, or neither for the fastest")
    if group["foreach"] and isinstance(group["lr"], torch.Tensor):
        raise SpftError("lr is a tensor, which the foreach kernel cannot read; pass a float")
    if group["state_bits"] == 8:
        bitsandbytes_functional()
    for key, only in TORCH_KEYS.items():
        if group.get(key, only) != only:
            raise SpftError(f"{key} is {group[key]!r}; SelectedNeuronAdamW has {key}={only} only")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _are_betas(value: Any) -> bool:
    pair = isinstance(value, tuple | list) and len(value) == 2
    return pair and all(_is_number(beta) and 0.0 <= beta < 1.0 for beta in value)


# Names of hyperparameters, what holds of their values, and the same in words.
_RULES = (
    (
        ("lr", "eps", "weight_decay"),
        lambda value: _is_number(value) and 0.0 <= value < math.inf,
        "a finite number, 0 or greater",
    ),
    (("betas",), _are_betas, "two numbers in [0, 1), such as (0.9, 0.999)"),
    (("foreach", "fused"), lambda value: value in (None, True, False), "True, False or None"),
    (("state_bits",), lambda value: type(value) is int and value in (8, 32), "8 or 32"),
    (("stochastic_rounding",), lambda value: isinstance(value, bool), "True or False"),
    (("seed",), lambda value: type(value) is int, "an integer"),
)


def completed_groups(
    own: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """The saved groups with the keys that their writer did not know, such as state_bits.

    Raises:
        SpftError: number or size of the groups differs, or their `state_bits`, or a saved
            hyperparameter asks for what this optimizer does not do.
    """
    sizes = [len(group["params"]) for group in own]
    saved_sizes = [len(group["params"]) for group in saved]
    if sizes != saved_sizes:
        raise SpftError(
            f"the checkpoint's optimizer has groups of {saved_sizes} parameters and this one of "
            f"{sizes}; resume with the adapter configuration of the checkpoint"
        )
    completed = []
    for own_group, saved_group in zip(own, saved, strict=True):
        bits = own_group["state_bits"]
        if saved_group.get("state_bits", 32) != bits:
            made_with = saved_group.get("state_bits", "not known to it (another optimizer)")
            raise SpftError(
                f"state_bits is {bits} and that of the checkpoint's optimizer is {made_with}; "
                "resume with the optimizer of the checkpoint"
            )
        # Which kernel does the work is no property of a run: it may go on on another device.
        kernel = {key: own_group[key] for key in ("foreach", "fused")}
        group = {**own_group, **saved_group, **kernel}
        check_hyperparameters(group)
        completed.append(group)
    return completed


def new_state(parameter: torch.Tensor, group: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """Zero state: the counter `step`, moments of the parameter's shape, and maxima of 8-bit ones.

    The counter is on the CPU, but where torch's fused kernel wants it: what reads it in every step
    must not wait for a device.

    Raises:
        SpftError: the moments are to be of 8 bits, and the parameter is a DTensor or fp64.
    """
    value = local_tensor(parameter)
    eight_bit = has_8bit_moments(parameter, group)
    counted_there = is_fused(group, value) and value.dtype not in HALF and not eight_bit
    device = value.device if counted_there else torch.device("cpu")
    counter = {"step": torch.zeros((), dtype=torch.float32, device=device)}
    if eight_bit:
        return counter | new_8bit_moments(parameter)
    dtype = torch.promote_types(value.dtype, torch.float32)
    return counter | {moment: torch.zeros_like(parameter, dtype=dtype) for moment in MOMENTS}


def fitting_state(
    own: Sequence[Mapping[str, Any]],
    saved: Sequence[Mapping[str, Any]],
    state: Mapping[Any, Mapping[str, Any]],
) -> dict[Any, dict[str, torch.Tensor]]:
    """Copies of the saved state by parameter, as this optimizer keeps it.

    State that is no parameter's is kept under its key, as torch keeps it.

    Raises:
        SpftError: the state is another optimizer's, or not of the parameter's shape.
    """
    fitting = dict(state)
    for group, saved_group in zip(own, saved, strict=True):
        for parameter, number in zip(group["params"], saved_group["params"], strict=True):
            values = fitting.pop(number, None)
            if values:
                fitting[parameter] = new_state(parameter, group)
                _fill(fitting[parameter], values, number)
    return fitting


def _fill(state: dict[str, torch.Tensor], saved: Mapping[str, Any], number: Any) -> None:
    if saved.keys() != state.keys():
        raise SpftError(
            f"the checkpoint's optimizer state of parameter {number} holds {sorted(saved)} instead "
            f"of {sorted(state)}: another optimizer has made it; resume with that one"
        )
    for key, target in state.items():
        value = torch.as_tensor(saved[key])  # others keep a plain number of steps
        if value.shape != target.shape:
            raise SpftError(
                f"{key} of parameter {number} is {tuple(value.shape)} in the checkpoint and "
                f"{tuple(target.shape)} here: the checkpoint was made with another number of "
                "neurons; resume with its own"
            )
        if isinstance(target, DTensor) and not isinstance(value, DTensor):
            value = value.to(target.device, target.dtype)
            value = distribute_tensor(value, target.device_mesh, target.placements)
        target.copy_(value)

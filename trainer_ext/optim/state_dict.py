"""Optimizer state as it is kept, and as it is taken from a state dict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.distributed.tensor import DTensor, distribute_tensor

from ..errors import SpftError
from .block_8bit import BLOCK, MIN_ELEMENTS
from .hyperparameters import check_hyperparameters
from .kernels import HALF, is_fused

MOMENTS = ("exp_avg", "exp_avg_sq")
# Which kernel does the work is no property of a run: it may go on on another device.
_OWN_KEYS = ("foreach", "fused")


def moment_dtype(parameter: torch.Tensor) -> torch.dtype:
    """Of moments that are not quantised: fp32 for 16-bit parameters, else the parameter's."""
    return torch.float32 if parameter.dtype in HALF else parameter.dtype


def counter_device(parameter: torch.Tensor, group: Mapping[str, Any]) -> torch.device:
    """Where the step counter is kept: on the CPU, but for the fused kernel where it wants it.

    The counters of 16-bit and of 8-bit tensors are read in every step, which must not wait for a
    device.
    """
    value = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    quantised = group["state_bits"] == 8 and parameter.numel() >= MIN_ELEMENTS
    if quantised or value.dtype in HALF or not is_fused(group, value):
        return torch.device("cpu")
    return value.device


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
        kept = {key: own_group[key] for key in _OWN_KEYS}
        group = {**own_group, **saved_group, **kept}
        check_hyperparameters(group)
        completed.append(group)
    return completed


def fitting_state(
    own: Sequence[Mapping[str, Any]],
    saved: Sequence[Mapping[str, Any]],
    state: Mapping[Any, Mapping[str, Any]],
) -> dict[Any, dict[str, torch.Tensor]]:
    """Saved state by parameter, on its device and in the precision that this optimizer keeps.

    Raises:
        SpftError: the state is another optimizer's, or not of the parameter's shape.
    """
    fitting: dict[Any, dict[str, torch.Tensor]] = {}
    known = set()
    for own_group, saved_group in zip(own, saved, strict=True):
        for parameter, number in zip(own_group["params"], saved_group["params"], strict=True):
            known.add(number)
            if state.get(number):
                _check_state(parameter, state[number], number, own_group)
                fitting[parameter] = {
                    key: _placed(key, value, parameter, own_group)
                    for key, value in state[number].items()
                }
    return fitting | {key: value for key, value in state.items() if key not in known}


def _check_state(
    parameter: torch.Tensor, state: Mapping[str, Any], number: Any, group: Mapping[str, Any]
) -> None:
    shapes = dict.fromkeys(MOMENTS, tuple(parameter.shape))
    if group["state_bits"] == 8 and parameter.numel() >= MIN_ELEMENTS:
        blocks = -(-parameter.numel() // BLOCK)
        shapes |= {f"{moment}_absmax": (blocks,) for moment in MOMENTS}
    if state.keys() != {"step", *shapes}:
        raise SpftError(
            f"the checkpoint's optimizer state of parameter {number} holds {sorted(state)} instead "
            f"of {sorted({'step', *shapes})}: another optimizer has made it; resume with that one"
        )
    for key, shape in shapes.items():
        if tuple(state[key].shape) != shape:
            raise SpftError(
                f"{key} of parameter {number} is {tuple(state[key].shape)} in the checkpoint and "
                f"{shape} here: the checkpoint was made with another number of neurons; resume "
                "with its own"
            )


def _placed(key: str, value: Any, parameter: torch.Tensor, group: Mapping[str, Any]):
    if key == "step":  # older torch and other writers keep a plain number
        value = torch.as_tensor(value, dtype=torch.float32).clone()
        return value.to(counter_device(parameter, group))
    dtype = moment_dtype(parameter) if value.is_floating_point() else value.dtype
    if key.endswith("_absmax"):
        dtype = torch.float32
    if isinstance(parameter, DTensor) and not isinstance(value, DTensor):
        value = value.to(parameter.device, dtype)
        return distribute_tensor(value, parameter.device_mesh, parameter.placements)
    return value.to(parameter.device, dtype, copy=True)

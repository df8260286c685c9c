"""Marks on the parameters that SPFT trains: an optimizer gets them without their names."""

from __future__ import annotations

from torch import nn

_MARK = "_spft_trained"


def mark_trained(parameter: nn.Parameter) -> None:
    """Say that a parameter is one that SPFT trains.

    The mark is lost where an engine puts another object in the parameter's place (FSDP2's
    `fully_shard`, a deep copy); `trained_parameters` sets it again.
    """
    setattr(parameter, _MARK, True)


def is_marked(parameter: nn.Parameter) -> bool:
    """Whether `mark_trained` was called on this very object."""
    return getattr(parameter, _MARK, False)


def trained_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The parameters that training changes, marked as such.

    Args:
        model: a PEFT model with an SPFT adapter.

    Returns:
        the compact deltas and the parameters of `modules_to_save` that require a gradient.
    """
    found = []
    for name, parameter in model.named_parameters():
        parts = name.split(".")
        if parameter.requires_grad and ("spft_delta" in parts or "modules_to_save" in parts):
            mark_trained(parameter)
            found.append(parameter)
    return found

"""Compact tensors to optimize, and the gradients that drive an optimizer over them."""

from __future__ import annotations

import torch
from torch import nn

from trainer_ext.tuner.marks import mark_trained

# A row vector, a tensor of less and two of more than 4096 elements, the last with a ragged block.
SHAPES = ((1, 8), (4, 32), (64, 96), (3, 1500))


def compact(
    dtype=torch.float32, shapes=SHAPES, scale: float = 0.1, device="cpu"
) -> list[nn.Parameter]:
    """Marked parameters as of deltas in training, the same every time."""
    generator = torch.Generator().manual_seed(0)
    parameters = [
        nn.Parameter((scale * torch.randn(shape, generator=generator)).to(device, dtype))
        for shape in shapes
    ]
    for parameter in parameters:
        mark_trained(parameter)
    return parameters


def set_gradients(parameters, step: int) -> None:
    """Gradients that are a function of the step's number, of very different sizes."""
    generator = torch.Generator().manual_seed(1000 + step)
    for i, parameter in enumerate(parameters):
        size = 10.0 ** (i % 3 - 2)
        gradient = size * torch.randn(parameter.shape, generator=generator)
        parameter.grad = gradient.to(parameter.device, parameter.dtype)


def drive(optimizer, steps: int, start: int = 0) -> None:
    """Step an optimizer by prescribed gradients of its parameters."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(start, start + steps):
        set_gradients(parameters, step)
        optimizer.step()


def state_of(optimizer) -> list[dict[str, torch.Tensor]]:
    """An optimizer's state by parameter in the order of the groups."""
    return [optimizer.state[p] for group in optimizer.param_groups for p in group["params"]]


def assert_driven_to_the_same_bits(optimizer, expected, steps: int) -> None:
    """Drive two optimizers, over parameters alike; parameters and states end with equal bits."""
    drive(optimizer, steps)
    drive(expected, steps)
    ours, theirs = (
        [p for group in o.param_groups for p in group["params"]] for o in (optimizer, expected)
    )
    assert same_bits(ours, theirs)
    assert same_bits(state_of(optimizer), state_of(expected))


def same_bits(a, b) -> bool:
    """Whether two lists of tensors or of states agree in dtype and every bit."""
    for x, y in zip(a, b, strict=True):
        if isinstance(x, dict):
            if x.keys() != y.keys() or not same_bits(x.values(), y.values()):
                return False
        elif x.dtype != y.dtype or not torch.equal(x, y):
            return False
    return True

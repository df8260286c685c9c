"""Looks into a base layer's forward and backward while a calibration runs.

The module's forward is replaced rather than hooked: the output before the bias exists only inside
it, and sharding engines hold the weight whole only there.

Shapes: T tokens, I = d_in, O = d_out.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from ..tuner.base_layers import quantisation_of


class Tap:
    """What a metric wants to know of one layer's passes; one object a layer.

    Attributes:
        before_bias: whether z is the output before the bias or after it.
    """

    before_bias = False

    def __init__(self, device: torch.device) -> None:
        # Makes the tapped output require a gradient where nothing below the layer does.
        self.anchor = torch.zeros((), requires_grad=True, device=device)

    def seen(self) -> None:
        """A forward of the layer begins, with gradients or without."""

    def kept(self, x: torch.Tensor, z: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """What of a layer's input (..., I) and output (..., O) its backward needs."""
        raise NotImplementedError

    def receive(self, grad: torch.Tensor, kept: tuple[torch.Tensor, ...]) -> None:
        """Take in the output's gradient (..., O)."""
        raise NotImplementedError


class _Passage(torch.autograd.Function):
    """Identity on a layer's output whose backward feeds a `Tap`."""

    @staticmethod
    def forward(ctx, z, anchor, x, tap: Tap):
        # "Modified in place" makes z itself the output: no copy, and no view that later in-place
        # operations would be refused on.
        ctx.mark_dirty(z)
        ctx.save_for_backward(*tap.kept(x, z))
        ctx.tap = tap
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        ctx.tap.receive(grad, ctx.saved_tensors)
        return grad, None, None, None


@contextmanager
def tapped(base: nn.Module, tap: Tap):
    """While inside, every forward of `base` with gradients enabled feeds `tap`."""

    def passing(original, had_own):
        def forward(x: torch.Tensor) -> torch.Tensor:
            tap.seen()
            if not torch.is_grad_enabled():  # a reference model's forward must not count
                return original(x)
            if not tap.before_bias or base.bias is None:
                return _Passage.apply(original(x), tap.anchor, x.detach(), tap)
            # A forward that others have put there (accelerate's device placement) must be called,
            # and that of a quantised layer.
            if had_own or quantisation_of(base):
                y = original(x)
                z = (y - base.bias).to(y.dtype)
            else:
                z = _linear_without_bias(base, x)
            z = _Passage.apply(z, tap.anchor, x.detach(), tap)
            return z + base.bias.to(z.dtype)

        return forward

    with replaced_forward(base, passing):
        yield


@contextmanager
def replaced_forward(base: nn.Module, make: Callable[[Callable, bool], Callable]):
    """Replace a module's forward while inside.

    Args:
        make: from the original forward, and whether it is one that others have put there, to the
            new one.
    """
    had_own = "forward" in base.__dict__
    original = base.forward
    base.forward = make(original, had_own)
    try:
        yield
    finally:
        if had_own:
            base.forward = original
        else:
            del base.forward


def as_linear_weight(base: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """A stored weight as torch.nn.functional.linear takes it, (O, I)."""
    return weight.t() if isinstance(base, Conv1D) else weight


def _linear_without_bias(base: nn.Module, x: torch.Tensor) -> torch.Tensor:
    return nn.functional.linear(x, as_linear_weight(base, base.weight))

"""Group Taylor: |sum_j w_ij gbar_ij|, from a layer's output and output gradient alone.

With z = W x the output before the bias and t running over all tokens of all batches,
sum_j w_ij gbar_ij = sum_t dL/dy_ti * z_ti (Molchanov et al. 2019, the group form). No weight
gradient is formed: memory is O(d_out) a layer, and the cost is one backward through the frozen
model.

Shapes: T tokens, O = d_out.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from transformers.pytorch_utils import Conv1D

from ..distributed import mean_over_processes
from .base import ImportanceMetric

# Tokens whose products are upcast to fp32 at a time: bounds the extra memory.
_CHUNK_TOKENS = 1024


class GroupTaylor(ImportanceMetric):
    """Magnitude of the loss's first-order change when a whole neuron is removed."""

    def __init__(self, layers, seed: int = 0) -> None:
        super().__init__(layers, seed)
        self._sums = {name: _OutputProduct(layer) for name, layer in layers.items()}
        self._batches = 0

    @contextmanager
    def attached(self):
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                stack.enter_context(_tapped(layer.get_base_layer(), self._sums[name]))
            yield

    def observe(self, run_batch) -> None:
        before = {name: product.total.clone() for name, product in self._sums.items()}
        run_batch(True)
        if self._any_overwritten():
            for name, product in self._sums.items():
                product.total.copy_(before[name])
                product.overwritten.fill_(False)
                product.copies_output = True
            run_batch(True)
        self._batches += 1

    def _any_overwritten(self) -> bool:
        """Whether any layer's output was, on any process: all of them run the batch again then."""
        flags = [product.overwritten for product in self._sums.values()]
        any_here = torch.stack([flag.to(flags[0].device) for flag in flags]).any()
        return bool(mean_over_processes({"any": any_here.double()})["any"])

    def scores(self) -> dict[str, torch.Tensor]:
        totals = mean_over_processes({name: p.total for name, p in self._sums.items()})
        return {
            name: total.abs().cpu().double() / max(self._batches, 1)
            for name, total in totals.items()
        }

    def silent_layers(self) -> list[str]:
        reached = mean_over_processes({n: p.reached.double() for n, p in self._sums.items()})
        return [name for name, count in reached.items() if not count]


class _OutputProduct:
    """Running sum over tokens of output gradient times output, for one layer.

    Attributes:
        total: (O,) fp64, so that the order of batches does not matter.
        reached: (1,) backward passes seen.
        overwritten: () whether a saved output changed before its backward, as models do that add
            to it in place and fused kernels that write past autograd (Liger's swiglu puts its
            gradient into its own inputs, its rope rotates in place).
        copies_output: keep a copy of the output for the backward instead of the output itself.
    """

    def __init__(self, layer) -> None:
        device = layer.get_base_layer().weight.device
        wide = torch.float32 if device.type == "mps" else torch.float64  # MPS has no fp64
        self.total = torch.zeros(layer.out_features, dtype=wide, device=device)
        self.reached = torch.zeros(1, device=device)
        self.overwritten = torch.zeros((), dtype=torch.bool, device=device)
        self.copies_output = False
        # Makes the tapped output require a gradient where nothing below the layer does.
        self.anchor = torch.zeros((), requires_grad=True, device=device)

    def add(self, grad_TO: torch.Tensor, z_TO: torch.Tensor) -> None:
        for grad, z in zip(grad_TO.split(_CHUNK_TOKENS), z_TO.split(_CHUNK_TOKENS), strict=True):
            self.total += (grad.float() * z.float()).sum(dim=0)
        self.reached += 1


class _Tap(torch.autograd.Function):
    """Identity on a layer's output whose backward feeds an `_OutputProduct`."""

    @staticmethod
    def forward(ctx, z, anchor, product: _OutputProduct):
        # "Modified in place" makes z itself the output: no copy, and no view that later in-place
        # operations would be refused on.
        ctx.mark_dirty(z)
        # z.data has a version counter of its own: models that add to the output in place (Falcon)
        # are noticed by the rows below instead of stopping the backward.
        kept = z.clone() if product.copies_output else z.data
        ctx.save_for_backward(kept, _some_rows(z).clone())
        ctx.product = product
        return z

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        z, rows = ctx.saved_tensors
        ctx.product.overwritten |= ((_some_rows(z) != rows) & ~rows.isnan()).any()
        ctx.product.add(grad.reshape(-1, grad.shape[-1]), z.reshape(-1, z.shape[-1]))
        return grad, None, None


def _some_rows(z: torch.Tensor) -> torch.Tensor:
    """Rows spread over the tokens, the last one included.

    Not the first alone: rotary kernels that work in place leave position 0 as it is.
    """
    z_TO = z.reshape(-1, z.shape[-1])
    return torch.cat([z_TO[:: max(1, len(z_TO) // 8)], z_TO[-1:]])


@contextmanager
def _tapped(base: nn.Module, product: _OutputProduct):
    """While inside, every forward of `base` with gradients enabled feeds `product`.

    The module's forward is replaced rather than hooked: the output before the bias exists only
    inside it, and sharding engines hold the weight whole only there.
    """
    had_own = "forward" in base.__dict__
    original = base.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        if not torch.is_grad_enabled():  # a reference model's forward must not count
            return original(x)
        if base.bias is None:
            return _Tap.apply(original(x), product.anchor, product)
        # A forward that others have put there (accelerate's device placement) must be called.
        z = original(x) - base.bias if had_own else _linear_without_bias(base, x)
        z = _Tap.apply(z, product.anchor, product)
        return z + base.bias.to(z.dtype)

    base.forward = forward
    try:
        yield
    finally:
        if had_own:
            base.forward = original
        else:
            del base.forward


def _linear_without_bias(base: nn.Module, x: torch.Tensor) -> torch.Tensor:
    weight = base.weight.t() if isinstance(base, Conv1D) else base.weight
    return nn.functional.linear(x, weight)

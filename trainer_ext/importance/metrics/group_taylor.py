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

from ...config.registry import register
from ...distributed.processes import any_process, mean_over_processes
from ..base import ImportanceMetric, chunks, wide_dtype
from ..taps import Tap, tapped


class OutputProductMetric(ImportanceMetric):
    """Metrics made of the products of a layer's outputs and output gradients."""

    needs_gradients = True

    def __init__(self, layers, config, model=None) -> None:
        super().__init__(layers, config, model)
        self._products = {name: self._new_product(layer) for name, layer in layers.items()}

    def _new_product(self, layer) -> OutputProduct:
        raise NotImplementedError

    @contextmanager
    def attached(self, names):
        with ExitStack() as stack:
            for name in names:
                base = self.layers[name].get_base_layer()
                stack.enter_context(tapped(base, self._products[name]))
            yield

    def _observe(self, batch, part) -> None:
        products = self._products.values()
        for product in products:
            product.begin(part)
        self._run(batch)
        # one look at the device for all layers; all processes run the batch again if any must
        device = next(iter(products)).overwritten.device
        if any_process(bool(torch.stack([p.overwritten.to(device) for p in products]).any())):
            for product in products:
                product.start_over()
            self._run(batch)

    def _run(self, batch) -> None:
        batch.run(True)

    def silent_layers(self) -> list[str]:
        return self._unreached({name: p.reached for name, p in self._products.items()})


class OutputProduct(Tap):
    """Running sums over tokens of output gradient times output, for one layer.

    Attributes:
        reached: (1,) backward passes seen.
        overwritten: () whether a saved output changed before its backward, as models do that add
            to it in place and fused kernels that write past autograd (Liger's swiglu puts its
            gradient into its own inputs, its rope rotates in place).
        copies_output: keep a copy of the output for the backward instead of the output itself.
    """

    before_bias = True

    def __init__(self, layer, sums_shape: tuple[int, ...]) -> None:
        device = layer.get_base_layer().weight.device
        super().__init__(device)
        # the first dimension is the part
        self.totals = torch.zeros(sums_shape, dtype=wide_dtype(device), device=device)
        self.reached = torch.zeros(1, device=device)
        self.overwritten = torch.zeros((), dtype=torch.bool, device=device)
        self.copies_output = False
        self.part = 0

    def begin(self, part: int) -> None:
        """A batch of the given part begins."""
        self.part = part
        self._before = self.totals[part].clone()

    def start_over(self) -> None:
        """Forget what the batch has added; from now on outputs are copied."""
        self.totals[self.part] = self._before
        self.overwritten.fill_(False)
        self.copies_output = True

    def kept(self, x, z):
        # z.data has a version counter of its own: models that add to the output in place (Falcon)
        # are noticed by the rows below instead of stopping the backward.
        return (z.clone() if self.copies_output else z.data), _some_rows(z)

    def receive(self, grad, kept) -> None:
        z, rows = kept
        self.overwritten |= (_some_rows(z) != rows).any()
        self.add(grad, z)
        self.reached += 1

    def add(self, grad: torch.Tensor, z: torch.Tensor) -> None:
        """Add the products of (..., O) gradients and outputs to the totals of the current part."""
        raise NotImplementedError


def _some_rows(z: torch.Tensor) -> torch.Tensor:
    """A copy of the bits of rows spread over the tokens, the last one included.

    Not the first alone: rotary kernels that work in place leave position 0 as it is. Bits, because
    a NaN is equal to nothing.
    """
    z_TO = z.reshape(-1, z.shape[-1])
    rows = torch.cat([z_TO[:: max(1, len(z_TO) // 8)], z_TO[-1:]])
    return rows.view(_BITS[rows.element_size()])


_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@register("group_taylor")
class GroupTaylor(OutputProductMetric):
    """Magnitude of the loss's first-order change when a whole neuron is removed."""

    def _new_product(self, layer):
        return _SumOverTokens(layer, (self.parts, layer.out_features))

    def _scores(self, parts):
        count = self._batches_in(parts)
        totals = {n: p.totals[list(parts)].sum(dim=0) for n, p in self._products.items()}
        return {
            name: total.abs().cpu().double() / count
            for name, total in mean_over_processes(totals).items()
        }


class _SumOverTokens(OutputProduct):
    def add(self, grad, z) -> None:
        add_products(self.totals[self.part], grad, z)


def add_products(total_O: torch.Tensor, grad: torch.Tensor, z: torch.Tensor) -> None:
    """Add the sum over tokens of grad * z, both (..., O), to a total; in fp32 within a chunk."""
    grad_TO, z_TO = grad.reshape(-1, grad.shape[-1]), z.reshape(-1, z.shape[-1])
    for grad_chunk, z_chunk in zip(chunks(grad_TO), chunks(z_TO), strict=True):
        total_O += (grad_chunk.float() * z_chunk).sum(dim=0)

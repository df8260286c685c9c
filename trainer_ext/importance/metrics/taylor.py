"""Taylor: sum_j |w_ij gbar_ij|, the element-wise first-order importance (arXiv 2502.11439).

gbar needs an accumulator as large as the targeted weights. Each process keeps its range of it in
fp32 (1/world of the weights), whichever engine holds the weights themselves; a layer's weight
gradient is formed in its backward, reduce-scattered and dropped.

Shapes: T tokens, I = d_in, O = d_out.
"""

from __future__ import annotations

import logging
from contextlib import ExitStack, contextmanager

import torch
from transformers.pytorch_utils import Conv1D

from ...config.registry import register
from ...distributed.processes import world_size
from ...errors import SpftError
from ..base import ImportanceMetric
from ..elementwise import sum_over_inputs
from ..sharded_sum import ShardedSums
from ..taps import Tap, tapped

logger = logging.getLogger(__name__)

_BYTES = 4  # of an fp32 accumulator element


@register("taylor")
class Taylor(ImportanceMetric):
    """Sum over a neuron's weights of the loss's first-order change when that weight is removed."""

    needs_gradients = True

    def __init__(self, layers, config, model=None) -> None:
        super().__init__(layers, config, model)
        self._layouts = {name: layer.shard_layout() for name, layer in layers.items()}
        self._devices = {n: layer.get_base_layer().weight.device for n, layer in layers.items()}
        self._reached = {n: torch.zeros(1, device=d) for n, d in self._devices.items()}
        self._found: dict[str, torch.Tensor] = {}  # layer name -> (kinds, d_out)
        self._part = 0

    def passes(self):
        """As many layers at a time as their accumulators fit into `accumulator_memory`.

        Raises:
            SpftError: a single layer's does not fit.
        """
        if self.config.accumulator_memory is None:
            return super().passes()
        limit = self.config.accumulator_memory * 2**30
        groups: list[list[str]] = [[]]
        used = 0
        for name, layout in self._layouts.items():
            size = self.parts * _BYTES * layout.block
            if size > limit:
                raise SpftError(
                    f"`accumulator_memory` is {self.config.accumulator_memory} GiB but layer "
                    f"{name} alone needs {size / 2**30:.3g} GiB; raise it, use more processes, or "
                    "use `importance`: group_taylor, which needs none"
                )
            if used + size > limit:
                groups.append([])
                used = 0
            groups[-1].append(name)
            used += size
        if len(groups) > 1:
            logger.warning(
                "SPFT runs the calibration batches %d times, for at most %d layers at a time, as "
                "accumulator_memory is %s GiB",
                len(groups),
                max(map(len, groups)),
                self.config.accumulator_memory,
            )
        return groups

    def begin_pass(self, names):
        super().begin_pass(names)
        layouts = {name: self._layouts[name] for name in names}
        try:
            self._sums = [
                ShardedSums(layouts, self._devices, self.config.accumulator_offload)
                for _ in range(self.parts)
            ]
        except torch.OutOfMemoryError:
            size = self.parts * _BYTES * sum(layout.block for layout in layouts.values())
            raise SpftError(
                f"`importance` taylor needs {size / 2**30:.1f} GiB on each process for its "
                "accumulators, which the device has not; set `accumulator_offload`: true, an "
                "`accumulator_memory` in GiB, or `importance`: group_taylor, which needs none"
            ) from None

    @contextmanager
    def attached(self, names):
        with ExitStack() as stack:
            for name in names:
                base = self.layers[name].get_base_layer()
                stack.enter_context(tapped(base, _WeightGradient(self, name)))
            yield

    def _observe(self, batch, part):
        self._part = part
        batch.run(True)
        self.sums.finish()

    @property
    def sums(self) -> ShardedSums:
        """Of the part that the current batch belongs to."""
        return self._sums[self._part]

    def reached(self, name: str) -> None:
        self._reached[name] += 1

    def end_pass(self):
        """Turn the accumulators into scores, of each part and of all, and drop them."""
        kinds = self._kinds()
        # compute_loss returns what DDP averages: the mean over processes is the batch's gradient
        counts = [self._batches_in(parts) * world_size() for parts in kinds]
        sums = [part.sums for part in self._sums]

        def terms(name, weight, block):
            for parts, count in zip(kinds, counts, strict=True):
                change = weight / count
                if len(parts) == 1:
                    change *= block.of(sums[parts[0]][name]).to(weight.device)
                else:
                    gradient = block.of(sums[0][name]).to(weight.device, copy=True)
                    for part in parts[1:]:
                        gradient += block.of(sums[part][name]).to(weight.device)
                    change *= gradient
                yield change.abs_()

        layers = {name: self.layers[name] for name in sums[0]}
        self._found |= sum_over_inputs(layers, terms, len(kinds))
        del self._sums

    def _kinds(self) -> list[tuple[int, ...]]:
        single = [(part,) for part in range(self.parts)]
        return single if self.parts == 1 else [tuple(range(self.parts)), *single]

    def _scores(self, parts):
        kind = self._kinds().index(parts)
        return {name: self._found[name][kind] for name in self.layers}

    def silent_layers(self):
        return self._unreached(self._reached)


class _WeightGradient(Tap):
    """Forms one layer's weight gradient in its backward and adds it to the metric's sums."""

    def __init__(self, metric: Taylor, name: str) -> None:
        base = metric.layers[name].get_base_layer()
        super().__init__(base.weight.device)
        self.metric, self.name = metric, name
        self.neurons_are_columns = isinstance(base, Conv1D)

    def seen(self) -> None:
        self.metric.sums.expect(self.name)

    def kept(self, x, z):
        return (x,)

    def receive(self, grad, kept) -> None:
        grad_TO = grad.reshape(-1, grad.shape[-1])
        x_TI = kept[0].reshape(-1, kept[0].shape[-1]).to(grad.dtype)
        left, right = (x_TI, grad_TO) if self.neurons_are_columns else (grad_TO, x_TI)

        def fill(out: torch.Tensor) -> None:
            if left.dtype == out.dtype:
                torch.mm(left.t(), right, out=out)
            else:  # the product in the activations' dtype, as training has it
                out.copy_(left.t() @ right)

        def add_to(out: torch.Tensor) -> None:
            if left.dtype == out.dtype:
                out.addmm_(left.t(), right)
            else:
                out += left.t() @ right

        self.metric.sums.add(self.name, add_to, fill)
        self.metric.reached(self.name)

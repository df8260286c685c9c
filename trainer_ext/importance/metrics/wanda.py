"""Wanda: sum_j |w_ij| * ||x_j||, x_j the j-th input over all tokens (Sun et al. 2024).

Forward passes only. Padding is left out: its activations say nothing about the data.

Shapes: B rows, S positions, T = B * S tokens, I = d_in.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack, contextmanager

import torch

from ...config.registry import register
from ...distributed.processes import sum_over_processes
from ..base import ImportanceMetric, chunks, wide_dtype
from ..elementwise import sum_over_inputs


@register("wanda")
class Wanda(ImportanceMetric):
    """Weights' magnitudes weighted by the L2 norms of their inputs over all processes' tokens."""

    def __init__(self, layers, config, model=None) -> None:
        super().__init__(layers, config, model)
        devices = {n: layer.get_base_layer().weight.device for n, layer in layers.items()}
        self._squares = {
            name: torch.zeros(
                self.parts,
                layer.in_features,
                dtype=wide_dtype(devices[name]),
                device=devices[name],
            )
            for name, layer in layers.items()
        }
        self._part = 0
        self._real_tokens: torch.Tensor | None = None

    @contextmanager
    def attached(self, names):
        with ExitStack() as stack:
            if self.model is not None:
                hook = self.model.register_forward_pre_hook(self._note_mask, with_kwargs=True)
                stack.callback(hook.remove)
            for name in names:
                hook = self._input_hook(name)
                handle = self.layers[name].get_base_layer().register_forward_pre_hook(hook)
                stack.callback(handle.remove)
            yield

    def _observe(self, batch, part):
        self._part = part
        batch.run(False)

    def _note_mask(self, module, args, kwargs) -> None:
        mask = kwargs.get("attention_mask")
        if mask is None and args:
            try:
                mask = (
                    inspect.signature(module.forward)
                    .bind(*args, **kwargs)
                    .arguments.get("attention_mask")
                )
            except TypeError:
                mask = None
        two_dimensional = isinstance(mask, torch.Tensor) and mask.dim() == 2
        # sample packing numbers the sequences of a row from 1; padding is 0 there too
        self._real_tokens = mask.reshape(-1) != 0 if two_dimensional else None

    def _input_hook(self, name: str):
        def hook(module, inputs):
            if not torch.is_grad_enabled():  # a reference model's forward must not count
                return
            x_TI = inputs[0].detach().reshape(-1, inputs[0].shape[-1])
            real = self._real_tokens
            if real is not None and len(real) == len(x_TI):
                x_TI = x_TI[real.to(x_TI.device)]
            squares = torch.zeros_like(self._squares[name][0])
            for chunk in chunks(x_TI):
                squares += chunk.float().square().sum(dim=0)
            self._squares[name][self._part] += squares

        return hook

    def _scores(self, parts):
        sums = {n: squares[list(parts)].sum(dim=0) for n, squares in self._squares.items()}
        norms = {name: total.sqrt() for name, total in sum_over_processes(sums).items()}

        def terms(name, weight, block):
            norm = norms[name].to(weight.dtype)
            if self.layers[name].is_conv1d:
                yield weight.abs() * norm[block.row : block.row_stop, None]
            else:
                yield weight.abs() * norm[block.column : block.column_stop]

        return {name: sums[0] for name, sums in sum_over_inputs(self.layers, terms).items()}

    def silent_layers(self):
        return self._unreached({n: squares.sum(dim=0) for n, squares in self._squares.items()})

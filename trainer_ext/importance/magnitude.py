"""Magnitude: sum_j |w_ij|^p. Needs no data (arXiv 2502.11439, the data-free baseline)."""

from __future__ import annotations

import torch

from .base import ImportanceMetric

# Rows that are converted to fp32 at a time: bounds the extra memory for any layer size.
_CHUNK_ROWS = 1024


class Magnitude(ImportanceMetric):
    """Sum of the p-th powers of a neuron's weights, p = 2."""

    needs_data = False
    p = 2

    @torch.no_grad()
    def scores(self) -> dict[str, torch.Tensor]:
        return {name: self._layer_scores(layer) for name, layer in self.layers.items()}

    def _layer_scores(self, layer) -> torch.Tensor:
        neurons = torch.arange(layer.out_features)
        return torch.cat(
            [
                layer.rows(chunk).float().abs().pow(self.p).sum(dim=1).cpu().double()
                for chunk in neurons.split(_CHUNK_ROWS)
            ]
        )

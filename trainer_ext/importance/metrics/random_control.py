"""Random scores: the control that every other metric has to beat."""

from __future__ import annotations

import torch

from ...config.registry import register
from ...seeding import generator_for
from ..base import ImportanceMetric


@register("random")
class RandomControl(ImportanceMetric):
    """Uniform scores, a function of the seed and the layer's name alone."""

    needs_data = False

    def _scores(self, parts):
        return {name: self._layer_scores(name, layer) for name, layer in self.layers.items()}

    def _layer_scores(self, name: str, layer) -> torch.Tensor:
        generator = generator_for(self.config.seed, name)
        return torch.rand(layer.out_features, dtype=torch.float64, generator=generator)

"""Random scores: the control that every other metric has to beat."""

from __future__ import annotations

import hashlib

import torch

from .base import ImportanceMetric


class RandomControl(ImportanceMetric):
    """Uniform scores, a function of the seed and the layer's name alone."""

    needs_data = False

    def scores(self) -> dict[str, torch.Tensor]:
        return {name: self._layer_scores(name, layer) for name, layer in self.layers.items()}

    def _layer_scores(self, name: str, layer) -> torch.Tensor:
        digest = hashlib.sha256(f"{self.seed}:{name}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.rand(layer.out_features, dtype=torch.float64, generator=generator)

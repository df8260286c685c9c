"""Magnitude: sum_j |w_ij|^p. Needs no data (arXiv 2502.11439, the data-free baseline)."""

from __future__ import annotations

from ...config.registry import register
from ..base import ImportanceMetric
from ..elementwise import sum_over_inputs


@register("magnitude")
class Magnitude(ImportanceMetric):
    """Sum of the p-th powers of a neuron's weights, p = 2."""

    needs_data = False
    p = 2

    def _scores(self, parts):
        def terms(name, weight, block):
            yield weight.abs().pow(self.p)

        return {name: sums[0] for name, sums in sum_over_inputs(self.layers, terms).items()}

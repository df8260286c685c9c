"""Zeroth-order Taylor: `taylor` with a gradient from forward passes alone (arXiv 2502.11439).

The gradient of the mean loss is estimated by two-sided random perturbations (SPSA, Spall 1992; as
in MeZO, Malladi et al. 2023): for direction z, c = (L(W + eps z) - L(W - eps z)) / (2 eps), and
gbar is the mean of c z over all directions of all batches. The noise is a function of seed, batch,
direction and layer: it is made anew for each use and never stored. Weights are perturbed inside the
layer's forward, on a copy that lives for that forward alone, so nothing drifts and a sharded weight
is perturbed where its engine has gathered it.
"""

from __future__ import annotations

import math
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

from ...config.registry import register
from ...distributed.processes import mean_over_processes
from ...ranking.stability import rank_correlation
from ...tuner.base_layers import quantisation_of
from ..base import ImportanceMetric
from ..elementwise import sum_over_inputs
from ..noise import CHUNK_ELEMENTS, chunk_rows, weight_noise
from ..taps import as_linear_weight, replaced_forward

# Below this rank correlation between two halves of the directions the ranking is mostly noise:
# the whole would correlate with another such run by less than 2 * 0.3 / (1 + 0.3) = 0.46.
NOISY_RANKING = 0.3


@register("zo_taylor")
class ZoTaylor(ImportanceMetric):
    """Sum over a neuron's weights of |w_ij gbar_ij| with a zeroth-order estimate of gbar."""

    def __init__(self, layers, config, model=None) -> None:
        super().__init__(layers, config, model)
        self.eps = config.zo_eps
        self._derivatives: list[tuple[int, int, float, int]] = []  # batch, direction, c, part
        self._perturbation: tuple[int, int, float] | None = None  # batch, direction, signed eps
        self._reached = {name: torch.zeros(1) for name in layers}
        layouts = {name: layer.shard_layout() for name, layer in layers.items()}
        self._shapes = {name: (layout.rows, layout.columns) for name, layout in layouts.items()}
        self._found: dict[str, torch.Tensor] = {}  # layer name -> (kinds, d_out)
        self._rank_correlation: dict[str, float] = {}

    @contextmanager
    def attached(self, names):
        with ExitStack() as stack:
            for name in names:
                base = self.layers[name].get_base_layer()
                stack.enter_context(replaced_forward(base, self._perturbed(name, base)))
            yield

    def noise(self, batch: int, direction: int, name: str, chunk: int) -> torch.Tensor:
        """Noise of a chunk of a layer's stored weight, see `weight_noise`."""
        rows, columns = self._shapes[name]
        key = (self.config.seed, batch, direction, name)
        device = self.layers[name].get_base_layer().weight.device
        return weight_noise(key, chunk, rows, columns, device)

    def _observe(self, batch, part):
        number = sum(self.batches)
        losses = {}
        for direction in range(self.config.zo_directions):
            for sign in (1.0, -1.0):
                self._perturbation = (number, direction, sign * self.eps)
                try:
                    losses[f"{direction}{sign}"] = batch.run(False).detach().cpu().double()
                finally:
                    self._perturbation = None
        losses = mean_over_processes(losses)
        for direction in range(self.config.zo_directions):
            change = losses[f"{direction}{1.0}"] - losses[f"{direction}{-1.0}"]
            derivative = change.item() / (2 * self.eps)
            self._derivatives.append((number, direction, derivative, part))

    def _perturbed(self, name: str, base: nn.Module):
        def make(original, had_own):
            def forward(x: torch.Tensor) -> torch.Tensor:
                # a reference model's forward (no gradients) is left alone
                if self._perturbation is None or not torch.is_grad_enabled():
                    return original(x)
                self._reached[name] += 1
                batch, direction, eps = self._perturbation
                # A forward that others have put there (accelerate's device placement) must be
                # called, and a quantised layer's, so there the perturbation's own output is added.
                apart = had_own or quantisation_of(base) is not None
                shape = self._shapes[name]
                weight = x.new_zeros(shape) if apart else base.weight.detach()
                moved = torch.empty_like(weight)
                step = chunk_rows(shape[1])
                for chunk in range(math.ceil(shape[0] / step)):
                    rows = slice(chunk * step, (chunk + 1) * step)
                    noise = self.noise(batch, direction, name, chunk).to(weight.device)
                    # one kernel: sums in the wider dtype of the two, rounded to the weight's
                    torch.add(weight[rows], noise, alpha=eps, out=moved[rows])
                linear_weight = as_linear_weight(base, moved)
                if apart:
                    return original(x) + nn.functional.linear(x, linear_weight)
                return nn.functional.linear(x, linear_weight, base.bias)

            return forward

        return make

    def end_pass(self):
        kinds = self._kinds()
        counts = [
            max(1, sum(self._atom(n) in atoms for n in range(self._count))) for atoms in kinds
        ]

        def terms(name, weight, block):
            # one sum for each atom; a kind of score is made of several
            sums = {atom: torch.zeros_like(weight) for atom in kinds[0]}
            # no block crosses the border of a chunk
            chunk, first = divmod(block.row, chunk_rows(self._shapes[name][1]))
            rows = slice(first, first + block.row_stop - block.row)
            for number, (batch, direction, derivative, _) in enumerate(self._derivatives):
                noise = self.noise(batch, direction, name, chunk)
                noise = noise[rows, block.column : block.column_stop].to(weight)
                sums[self._atom(number)].add_(noise, alpha=derivative)
            for atoms, count in zip(kinds, counts, strict=True):
                yield (weight * sum(sums[atom] for atom in atoms) / count).abs()
            yield weight.abs()

        self._found = sum_over_inputs(self.layers, terms, len(kinds) + 1, CHUNK_ELEMENTS)
        if self._count > 1:
            for name, scores in self._found.items():
                *_, even, odd, magnitude = scores.clamp_min(1e-300)
                self._rank_correlation[name] = rank_correlation(even / magnitude, odd / magnitude)

    @property
    def _count(self) -> int:
        return len(self._derivatives)

    def _atom(self, number: int) -> tuple[int, int]:
        """What of the scores' kinds a direction belongs to: its batch's part, even or odd."""
        return self._derivatives[number][3], number % 2

    def _kinds(self) -> list[list[tuple[int, int]]]:
        """Sets of atoms whose scores are wanted: all, each part, even and odd directions."""
        every = [(part, parity) for part in range(self.parts) for parity in (0, 1)]
        parts = [[atom for atom in every if atom[0] == part] for part in range(self.parts)]
        return [every, *parts, every[0::2], every[1::2]]

    def _scores(self, parts):
        kind = 0 if len(parts) == self.parts else 1 + parts[0]
        return {name: self._found[name][kind] for name in self.layers}

    def silent_layers(self):
        return self._unreached(self._reached)

    def diagnostics(self):
        """How good the estimate is.

        `gradient_variance` is the variance of each weight's estimated gradient, mean(c^2) / n over
        n directions (its noise has unit variance and is independent of c to first order).
        `rank_correlation` is Spearman's between two halves of the directions, of the scores over
        sum_j |w_ij|: a gradient of pure noise still ranks neurons by the size of their weights,
        which both halves share.
        """
        squares = [derivative**2 for _, _, derivative, _ in self._derivatives]
        found: dict[str, object] = {
            "directions": self._count,
            "gradient_variance": sum(squares) / self._count**2,
        }
        if self._rank_correlation:
            found["rank_correlation"] = self._rank_correlation
        return found

    def warnings(self):
        if not self._rank_correlation:
            return []
        middle = torch.tensor(list(self._rank_correlation.values())).median().item()
        if middle >= NOISY_RANKING:
            return []
        return [
            f"zo_taylor's ranking is mostly noise: two halves of its {self._count} directions "
            f"correlate by {middle:.2f} (median of the layers, at least {NOISY_RANKING} wanted); "
            "use more `zo_directions` or `calibration_batches`, or `importance`: group_taylor"
        ]

"""How far a selection depends on which calibration data was seen.

The scores of two halves of the calibration batches select two sets of neurons. Their overlap says
how much of the selection is the model's and how much is the sample's.
"""

from __future__ import annotations

import functools
import math
import statistics
from dataclasses import dataclass

import torch

# Agreement beyond chance of the halves' selections: below POOR a warning is due, and GOAL is what
# the recommended number of batches aims at.
POOR = 0.5
GOAL = 0.7


@dataclass(frozen=True)
class Stability:
    """Agreement of the selections by two halves of the calibration batches.

    Attributes:
        overlap: layer name -> share of the selected neurons that both halves select.
        chance: layer name -> the share that two random selections would have in common, r / d_out.
        batches: calibration batches of both halves together.
        batches_wanted: estimate of the batches at which the halves would agree by GOAL; None where
            they agree no better than chance, or well enough.
    """

    overlap: dict[str, float]
    chance: dict[str, float]
    batches: int
    batches_wanted: int | None = None

    @property
    def agreement(self) -> float:
        """Median over the layers of the overlap beyond chance: 1 is equal, 0 is chance.

        Layers of which every neuron is selected say nothing and are left out; 1 if all are.
        """
        found = [
            _beyond_chance(self.overlap[name], chance)
            for name, chance in self.chance.items()
            if chance < 1
        ]
        return statistics.median(found) if found else 1.0

    def warning(self) -> str | None:
        """One line where the agreement is poor, with how many more batches would help."""
        if self.agreement >= POOR:
            return None
        if self.batches_wanted is None:
            advice = "the data may say little about single neurons: try many more"
        else:
            advice = f"about {self.batches_wanted} in all would give {GOAL}; raise"
        return (
            f"the selection depends much on the calibration data: two halves of {self.batches} "
            f"batches agree by {self.agreement:.2f} beyond chance (median of the layers, "
            f"1 is equal); {advice} `calibration_batches`"
        )


def measure_stability(
    first: dict[str, torch.Tensor],
    second: dict[str, torch.Tensor],
    neurons: dict[str, int],
    batches: int,
) -> Stability:
    """Compare the selections by the scores of two halves of the data.

    Args:
        first, second: layer name -> (d_out,) scores of either half.
        neurons: layer name -> how many neurons are selected.
        batches: of both halves together.
    """
    overlap, chance = {}, {}
    for name, r in neurons.items():
        d_out = first[name].numel()
        in_first = torch.zeros(d_out, dtype=torch.bool)
        in_first[first[name].sort(descending=True, stable=True).indices[:r]] = True
        top_second = second[name].sort(descending=True, stable=True).indices[:r]
        overlap[name] = in_first[top_second].double().mean().item()
        chance[name] = r / d_out
    return Stability(overlap, chance, batches, _batches_wanted(overlap, chance, batches))


def rank_correlation(a: torch.Tensor, b: torch.Tensor) -> float:
    """Spearman's rank correlation of two (n,) tensors; 0 where one of them is constant."""
    ranks = torch.stack([_ranks(a), _ranks(b)])
    if bool((ranks.std(dim=1) == 0).any()) or ranks.shape[1] < 2:
        return 0.0
    return torch.corrcoef(ranks)[0, 1].item()


def expected_overlap(correlation: float, share: float) -> float:
    """Overlap of the top `share` by two normal scores with the given correlation.

    P(second in its top | first in its top) of a bivariate normal, by quadrature.
    """
    cut = torch.special.ndtri(torch.tensor(1 - share, dtype=torch.float64))
    x = torch.linspace(0, 9, 4001, dtype=torch.float64) + cut
    density = torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)
    both = torch.special.ndtr((correlation * x - cut) / math.sqrt(1 - correlation**2))
    return (torch.trapezoid(density * both, x) / share).item()


def _batches_wanted(
    overlap: dict[str, float], chance: dict[str, float], batches: int
) -> int | None:
    """Batches at which halves would agree by GOAL: a normal model of score and noise.

    The overlap tells the correlation of the halves' scores; Spearman-Brown's formula tells how many
    times the data raise it to the one that gives GOAL.
    """
    factors = []
    for name, share in chance.items():
        if share == 1:
            continue
        if _beyond_chance(overlap[name], share) >= GOAL:
            factors.append(1.0)
            continue
        seen = _correlation_of(overlap[name], share)
        wanted = _correlation_of(share + GOAL * (1 - share), share)
        factors.append(wanted * (1 - seen) / (seen * (1 - wanted)) if seen > 0 else math.inf)
    middle = statistics.median(factors) if factors else 1.0
    return None if middle == 1.0 or math.isinf(middle) else math.ceil(middle * batches)


@functools.cache
def _correlation_of(overlap: float, share: float) -> float:
    """The correlation whose expected overlap is `overlap`, by bisection; 0 for chance or less."""
    low, high = 0.0, 1 - 1e-9
    if overlap <= share:
        return 0.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if expected_overlap(middle, share) < overlap else (low, middle)
    return (low + high) / 2


def _beyond_chance(overlap: float, chance: float) -> float:
    return (overlap - chance) / (1 - chance)


def _ranks(values: torch.Tensor) -> torch.Tensor:
    """Ranks from 0, equal values sharing the mean of theirs."""
    _, inverse, counts = values.double().unique(return_inverse=True, return_counts=True)
    ends = counts.cumsum(0)
    return (ends - (counts + 1) / 2.0)[inverse].double()

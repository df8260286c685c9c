"""Stability: halves of the calibration data are compared by the scores that each of them alone
gives, the overlap is a plain set intersection, and the advice follows its stated model: the
bivariate normal's overlap (checked by sampling) and Spearman-Brown's formula."""

from __future__ import annotations

import pytest
import torch
from adapters import wrapped
from calibrations import runs
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_models import batch

from trainer_ext import measure_importance
from trainer_ext.importance.class_column import CLASS_KEY
from trainer_ext.ranking.selection import top_neurons
from trainer_ext.ranking.stability import (
    GOAL,
    POOR,
    expected_overlap,
    measure_stability,
    rank_correlation,
)

BATCHES = [{**batch(seed, rows=4), CLASS_KEY: torch.tensor([0, 1, 2, 1])} for seed in range(4)]
DATA_DRIVEN = ("taylor", "group_taylor", "zo_taylor", "quantile_mean", "wanda")


def measure(importance, batches, **fields):
    if importance != "quantile_mean":
        batches = [{k: v for k, v in b.items() if k != CLASS_KEY} for b in batches]
    fields = {"class_field": "topic", "r": 6, **fields}
    model = wrapped(importance=importance, **fields)
    return measure_importance(model, runs(model, batches))


# not zo_taylor: its noise depends on the batch's number, so a half cannot be run by itself
@pytest.mark.parametrize("importance", sorted(set(DATA_DRIVEN) - {"zo_taylor"}))
def test_overlap_is_that_of_separate_calibrations_on_the_halves(importance):
    whole = measure(importance, BATCHES)
    halves = [measure(importance, BATCHES[start::2]).scores for start in (0, 1)]
    assert whole.stability.batches == 4
    for name, overlap in whole.stability.overlap.items():
        first, second = (set(top_neurons(half[name], 6).tolist()) for half in halves)
        assert overlap == pytest.approx(len(first & second) / 6)
        assert whole.stability.chance[name] == 6 / len(whole.scores[name])


@pytest.mark.parametrize("importance", DATA_DRIVEN)
def test_halves_change_nothing_about_the_scores(importance):
    with_halves, without = (
        measure(importance, BATCHES),
        measure(importance, BATCHES, stability=False),
    )
    assert with_halves.stability is not None
    assert without.stability is None
    for name, scores in with_halves.scores.items():
        error = (scores - without.scores[name]).abs().max()
        assert error <= 1e-6 * scores.max()


def test_equal_halves_overlap_wholly_and_one_batch_has_no_halves():
    twice = measure("group_taylor", [BATCHES[0], BATCHES[0]])
    assert set(twice.stability.overlap.values()) == {1.0}
    assert twice.stability.agreement == 1.0
    assert twice.warnings == []
    assert measure("group_taylor", BATCHES[:1]).stability is None
    assert measure("magnitude", []).stability is None


def test_poor_agreement_is_a_warning_with_advice():
    generator = torch.Generator().manual_seed(0)
    signal = torch.randn(2000, generator=generator, dtype=torch.float64)

    def half(noise):
        return {"a": signal + noise * torch.randn(2000, generator=generator, dtype=torch.float64)}

    noisy = measure_stability(half(2.0), half(2.0), {"a": 200}, batches=8)
    assert noisy.agreement < POOR
    assert f"about {noisy.batches_wanted} in all" in noisy.warning()
    # with that many batches the noise's variance is smaller in proportion
    less = 2.0 * (8 / noisy.batches_wanted) ** 0.5
    again = measure_stability(half(less), half(less), {"a": 200}, batches=noisy.batches_wanted)
    assert again.agreement == pytest.approx(GOAL, abs=0.08)
    clear = measure_stability(half(0.05), half(0.05), {"a": 200}, batches=8)
    assert clear.warning() is None
    assert clear.batches_wanted is None
    chance = measure_stability({"a": signal}, {"a": -signal}, {"a": 200}, batches=8)
    assert chance.batches_wanted is None
    assert "may say little about single neurons" in chance.warning()


@pytest.mark.parametrize(
    ("correlation", "share"), [(0.0, 0.1), (0.5, 0.1), (0.9, 0.3), (0.99, 0.02)]
)
def test_expected_overlap_is_that_of_sampled_normals(correlation, share):
    generator = torch.Generator().manual_seed(1)
    count = 400_000
    first = torch.randn(count, generator=generator)
    second = correlation * first + (1 - correlation**2) ** 0.5 * torch.randn(
        count, generator=generator
    )
    top = int(share * count)
    tops = [set(values.topk(top).indices.tolist()) for values in (first, second)]
    sampled = len(tops[0] & tops[1]) / top
    assert expected_overlap(correlation, share) == pytest.approx(sampled, abs=4 / top**0.5)


def test_layers_that_are_wholly_selected_say_nothing():
    found = measure_stability(
        {"a": torch.arange(4.0), "b": torch.arange(4.0)},
        {"a": torch.arange(4.0).flip(0), "b": torch.arange(4.0)},
        {"a": 4, "b": 2},
        batches=2,
    )
    assert found.agreement == 1.0


@settings(deadline=None)
@given(st.lists(st.integers(-5, 5), min_size=2, max_size=40))
def test_rank_correlation_is_spearmans(values):
    a = torch.tensor(values, dtype=torch.float64)
    assert rank_correlation(a, torch.ones_like(a)) == 0.0
    if len(set(values)) > 1:
        assert rank_correlation(a, a * 3 + 1) == pytest.approx(1.0)
        assert rank_correlation(a, -a.exp()) == pytest.approx(-1.0)
    # by definition: Pearson's on ranks, ties sharing their mean rank
    b = torch.roll(a, 1)
    ranks = [torch.stack([((x < v).sum() + ((x == v).sum() - 1) / 2.0) for v in x]) for x in (a, b)]
    expected = torch.corrcoef(torch.stack(ranks))[0, 1].nan_to_num(0.0).item()
    assert rank_correlation(a, b) == pytest.approx(expected, abs=1e-6)

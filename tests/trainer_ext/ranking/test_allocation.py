"""The global budget is a pure function of the scores: it equals a plain greedy reference, whose
neurons are the highest of each layer; it never exceeds the budget, leaves less than the cheapest
neuron that could still be added costs, and keeps floors and ceilings. A layer's scale, the order of
its neurons and the order in which scores are given change nothing; one layer alone gets the uniform
number."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer_ext import SpftError
from trainer_ext.ranking.allocation import allocate, gains
from trainer_ext.ranking.selection import top_neurons

# few distinct values beside the others, so that ties are the rule; far from under- and overflow
SCORES = st.lists(
    st.one_of(st.floats(1e-6, 1e6), st.sampled_from([0.0, 1.0, 2.0])), min_size=1, max_size=12
)


@st.composite
def problems(draw, most_layers=5):
    """Scores as lists, and the other arguments of `allocate`."""
    names = [f"layers.{i}" for i in range(draw(st.integers(1, most_layers)))]
    scores = {name: draw(SCORES) for name in names}
    return scores, {
        "d_in": {name: draw(st.integers(1, 9)) for name in names},
        "uniform": {name: draw(st.integers(1, len(scores[name]))) for name in names},
        "floor": draw(st.one_of(st.floats(0.01, 1.0), st.sampled_from([0.25, 0.5, 1.0]))),
        "ceiling": draw(st.one_of(st.floats(1.0, 6.0), st.sampled_from([1.0, 2.0, 4.0]))),
    }


def tensors(scores):
    return {name: torch.tensor(values, dtype=torch.float64) for name, values in scores.items()}


def bounds(scores, problem, name):
    uniform = problem["uniform"][name]
    least = max(1, math.ceil(problem["floor"] * uniform))
    return least, min(len(scores[name]), max(least, int(problem["ceiling"] * uniform)))


def cost(counts, problem):
    return sum(count * problem["d_in"][name] for name, count in counts.items())


def reference(scores, problem):
    """Neurons that are taken one by one, each time the best of all that are allowed and fit."""
    names, d_in = list(problem["uniform"]), problem["d_in"]
    values = {}
    for name in names:
        top = max(scores[name])
        squares = math.fsum((s / top) ** 2 for s in scores[name]) if top else 0.0
        rms = math.sqrt(squares / len(scores[name])) if top else 1.0
        values[name] = [s / (top or 1.0) / rms / d_in[name] for s in scores[name]]
    taken = {}
    for name in names:
        best_first = sorted(range(len(scores[name])), key=lambda i: (-scores[name][i], i))
        taken[name] = set(best_first[: bounds(scores, problem, name)[0]])
    budget = cost(problem["uniform"], problem)
    while True:
        left = budget - cost({name: len(taken[name]) for name in names}, problem)
        best = None
        for name in names:
            if len(taken[name]) == bounds(scores, problem, name)[1] or d_in[name] > left:
                continue
            for neuron, value in enumerate(values[name]):
                if neuron in taken[name]:
                    continue
                better = best is None or value > best[0]
                if best is not None and name == best[1] and value == best[0]:
                    # the division may have made unequal scores equal
                    better = scores[name][neuron] > scores[name][best[2]]
                if better:
                    best = (value, name, neuron)
        if best is None:
            return taken
        taken[best[1]].add(best[2])


@given(problems())
def test_equals_a_plain_greedy_reference_neuron_by_neuron(problem):
    scores, rest = problem
    counts = allocate(tensors(scores), **rest)
    expected = reference(scores, rest)
    for name, values in tensors(scores).items():
        assert set(top_neurons(values, counts[name]).tolist()) == expected[name]


@given(problems())
def test_the_budget_is_kept_and_used_up_within_floors_and_ceilings(problem):
    scores, rest = problem
    counts = allocate(tensors(scores), **rest)
    assert list(counts) == list(rest["uniform"])
    left = cost(rest["uniform"], rest) - cost(counts, rest)
    assert left >= 0
    for name, count in counts.items():
        least, most = bounds(scores, rest, name)
        assert least <= count <= most
        assert count == most or rest["d_in"][name] > left


@given(problems(), st.data())
def test_scale_and_order_of_a_layers_neurons_change_nothing(problem, data):
    scores, rest = problem
    changed = {}
    for name in reversed(scores):
        factor = 2.0 ** data.draw(st.integers(-60, 60))
        changed[name] = [factor * s for s in data.draw(st.permutations(scores[name]))]
    assert allocate(tensors(changed), **rest) == allocate(tensors(scores), **rest)


@given(problems(most_layers=1))
def test_one_layer_gets_the_uniform_number(problem):
    scores, rest = problem
    assert allocate(tensors(scores), **rest) == rest["uniform"]


@given(problems())
def test_floor_and_ceiling_of_one_give_the_uniform_numbers(problem):
    scores, rest = problem
    assert allocate(tensors(scores), **{**rest, "floor": 1.0, "ceiling": 1.0}) == rest["uniform"]


def test_by_hand():
    """Budget 2 * 2 + 2 * 4 = 12. Floors cost 6. The peak of `a` gains more than all of `b`."""
    scores = {"a": [4.0, 4.0, 4.0, 0.0], "b": [1.0, 1.0, 1.0, 1.0]}
    rest = {"d_in": {"a": 2, "b": 4}, "uniform": {"a": 2, "b": 2}, "floor": 0.5, "ceiling": 2.0}
    # a: rms 3.46, so 1.15 / 2 three times and then 0; b: 1 / 4. Left after a's second and third: 2,
    # too little for b's second, but enough for a's last, which gains nothing.
    assert allocate(tensors(scores), **rest) == {"a": 4, "b": 1}


def test_a_layer_without_any_importance_gets_its_floor():
    scores = {"silent": [0.0] * 8, "loud": [1.0] * 8}
    rest = {"d_in": {"silent": 3, "loud": 3}, "uniform": {"silent": 4, "loud": 4}}
    assert allocate(tensors(scores), **rest, floor=0.25, ceiling=2.0) == {"silent": 1, "loud": 7}


def test_no_layers():
    assert allocate({}, {}, {}, 0.25, 4.0) == {}


@given(SCORES, st.integers(1, 9), st.integers(-900, 900))
def test_gains_have_the_root_mean_square_of_one_parameter(values, d_in, exponent):
    """Also where the squares of the scores would underflow or overflow."""
    scores = torch.tensor(values, dtype=torch.float64) * 2.0**exponent
    gained = gains(scores, d_in)
    assert gained.dtype == torch.float64
    assert bool((gained.diff() <= 0).all())
    rms = float(gained.square().mean().sqrt())
    assert rms == pytest.approx(1 / d_in if any(values) else 0.0, rel=1e-12)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_scores_that_are_not_finite_are_refused_naming_the_layer(value):
    scores = tensors({"fine": [1.0, 2.0], "the.bad.one": [1.0, value]})
    ones = {"fine": 1, "the.bad.one": 1}
    with pytest.raises(SpftError, match=r"layer the\.bad\.one: 1 of 2"):
        allocate(scores, d_in=ones, uniform=ones, floor=0.5, ceiling=2.0)


def test_the_whole_budget_of_a_large_model_is_used():
    """Half a million neurons, as a model of one or two billion parameters has."""
    generator = torch.Generator().manual_seed(0)
    names = [f"layers.{i}" for i in range(128)]
    scores = {name: torch.rand(4096, generator=generator) for name in names}
    counts = allocate(scores, dict.fromkeys(names, 2048), dict.fromkeys(names, 64), 0.25, 4.0)
    assert sum(counts.values()) == 128 * 64

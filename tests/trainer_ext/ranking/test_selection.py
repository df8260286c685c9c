"""A selection is a pure function of the scores: the r highest, ties by lower index, ascending;
permuting neurons permutes it; NaN and infinite scores are refused naming the layer. Its file gives
back what went in, and damage or a wrong kind is refused in one line."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from adapters import fill_deltas, selected, wrapped
from hypothesis import given
from hypothesis import strategies as st

from trainer_ext import (
    ImportanceScores,
    NeuronSelection,
    SpftError,
    apply_selection,
    current_selection,
    select_by_scores,
)
from trainer_ext.files.atomic import read_tensors, write_tensors
from trainer_ext.ranking.selection import select_top, top_neurons
from trainer_ext.ranking.stability import Stability

FINITE = st.floats(-1e30, 1e30, allow_nan=False, width=64)
# few distinct values, so that ties are the rule
SCORES = st.lists(st.one_of(FINITE, st.sampled_from([0.0, 1.0, 2.0])), min_size=1, max_size=40)


@given(SCORES, st.data())
def test_top_neurons_are_the_highest_with_ties_by_lower_index(values, data):
    r = data.draw(st.integers(1, len(values)))
    expected = sorted(sorted(range(len(values)), key=lambda i: (-values[i], i))[:r])
    got = top_neurons(torch.tensor(values, dtype=torch.float64), r)
    assert got.tolist() == expected
    assert got.dtype == torch.int64


@given(st.permutations(range(12)), st.integers(1, 12))
def test_permuting_neurons_permutes_the_selection(permutation, r):
    scores = torch.arange(12, dtype=torch.float64).pow(2)  # distinct
    order = torch.tensor(permutation)
    chosen = set(top_neurons(scores, r).tolist())
    assert {int(order[i]) for i in top_neurons(scores[order], r)} == chosen


@given(st.integers(0, 5), st.sampled_from([float("nan"), float("inf"), float("-inf")]))
def test_scores_that_are_not_finite_are_refused_naming_the_layer(position, value):
    scores = torch.ones(6)
    scores[position] = value
    with pytest.raises(SpftError, match=r"layer the\.bad\.one: 1 of 6"):
        select_top({"fine": torch.ones(6), "the.bad.one": scores}, {"fine": 2, "the.bad.one": 2})


@given(
    st.dictionaries(
        st.text("abc.", min_size=1, max_size=8), st.integers(1, 30), min_size=1, max_size=4
    ),
    st.data(),
)
def test_file_round_trip(tmp_path_factory, sizes, data):
    index = {
        name: torch.tensor(sorted(data.draw(st.sets(st.integers(0, n - 1), min_size=1))))
        for name, n in sizes.items()
    }
    selection = NeuronSelection(index, sizes, metadata={"metric": "random"})
    path = tmp_path_factory.mktemp("selection") / "file.safetensors"
    selection.save(path)
    loaded = NeuronSelection.load(path)
    assert loaded.out_features == sizes
    assert (loaded.axis, loaded.metadata) == ("rows", {"metric": "random"})
    assert loaded.index.keys() == index.keys()
    assert all(torch.equal(loaded.index[name], index[name]) for name in index)
    assert [p.name for p in path.parent.iterdir()] == ["file.safetensors"]


def test_scores_file_round_trip(tmp_path):
    scores = ImportanceScores(
        {"a": torch.rand(5, dtype=torch.float64)},
        "group_taylor",
        batches=8,
        seconds=1.25,
        silent_layers=["b"],
        stability=Stability({"a": 0.5}, {"a": 0.25}, 8, 20),
        diagnostics={"rank_correlation": {"a": 0.1}},
        warnings=["raise `calibration_batches`"],
        metadata={"x": "y"},
    )
    scores.save(tmp_path / "scores")
    loaded = ImportanceScores.load(tmp_path / "scores")
    assert torch.equal(loaded.scores["a"], scores.scores["a"])
    for field in dataclasses.fields(ImportanceScores):
        if field.name != "scores":
            assert getattr(loaded, field.name) == getattr(scores, field.name)


def test_scores_files_without_the_newer_entries_are_read(tmp_path):
    ImportanceScores({"a": torch.rand(5, dtype=torch.float64)}, "group_taylor", 8).save(
        tmp_path / "x"
    )
    tensors, metadata = read_tensors(tmp_path / "x", "spft_importance")
    for name in ("stability", "diagnostics", "warnings"):
        del metadata[name]
    write_tensors(tmp_path / "old", tensors, metadata)
    old = ImportanceScores.load(tmp_path / "old")
    assert (old.stability, old.diagnostics, old.warnings) == (None, {}, [])


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_a_truncated_file_is_refused(tmp_path, share):
    path = tmp_path / "file.safetensors"
    NeuronSelection({"a": torch.arange(50)}, {"a": 60}).save(path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(SpftError, match="not a whole safetensors file"):
        NeuronSelection.load(path)


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "file.safetensors"
    NeuronSelection({"a": torch.arange(3)}, {"a": 6}).save(path)
    before = path.read_bytes()
    with pytest.raises(Exception, match=r"str|metadata|argument"):
        NeuronSelection({"a": torch.arange(4)}, {"a": 6}, metadata={"not": object()}).save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["file.safetensors"]


def test_files_of_another_kind_are_refused(tmp_path):
    NeuronSelection({"a": torch.arange(3)}, {"a": 6}).save(tmp_path / "selection")
    with pytest.raises(SpftError, match=r"spft_selection.*spft_importance"):
        ImportanceScores.load(tmp_path / "selection")
    with pytest.raises(SpftError, match="does not exist"):
        ImportanceScores.load(tmp_path / "nothing")


def test_apply_and_read_back():
    model = wrapped()
    selection = current_selection(selected(seed=5))
    apply_selection(model, selection)
    back = current_selection(model)
    assert all(torch.equal(back.index[name], selection.index[name]) for name in selection.index)


def test_reading_an_unselected_adapter_is_an_error():
    with pytest.raises(SpftError, match="not been selected"):
        current_selection(wrapped())


def test_a_trained_adapter_is_not_reselected():
    model = selected()
    fill_deltas(model)
    before = current_selection(model)
    with pytest.raises(SpftError, match="already trained"):
        apply_selection(model, current_selection(selected(seed=5)))
    after = current_selection(model)
    assert all(torch.equal(after.index[n], before.index[n]) for n in before.index)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.pop("model.layers.0.self_attn.q_proj"), "the adapter has 1 layers"),
        (lambda s: s.update(extra=torch.ones(4)), "the importance scores has 1 layers"),
        (
            lambda s: s.update({"model.layers.0.self_attn.q_proj": torch.ones(31)}),
            "31 neurons in the importance scores but 32",
        ),
    ],
)
def test_scores_of_another_model_are_refused_with_what_differs(change, message):
    model = wrapped()
    scores = {n: torch.ones(s) for n, s in current_selection(selected()).out_features.items()}
    change(scores)
    with pytest.raises(SpftError, match=message):
        select_by_scores(model, ImportanceScores(scores, "random"))

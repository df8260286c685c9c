"""Calibration without a trainer in 2 real processes. Under FSDP2's fully_shard, checkpointing off,
reentrant and not: scores within 1e-5 of the layer's largest score of one process (zo_taylor: what
the rounding of the loss leaves), the same neurons, and rows of the sharded base read and written
exactly. Where a layer runs on one process only: nobody hangs and the scores are those of dense
autograd's gradients averaged over the processes."""

from __future__ import annotations

import pytest
import torch
from forked import launch


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return launch("shards_worker.py", tmp_path_factory.mktemp("one"), 1, "fsdp2")[0]


@pytest.fixture(scope="module")
def fsdp2(tmp_path_factory):
    return launch("shards_worker.py", tmp_path_factory.mktemp("two"), 2, "fsdp2")


def test_fsdp2_scores_and_selects_as_one_process(fsdp2, one_process):
    cases = set(one_process) - {"rewritten"}
    assert len(cases) == 13
    for case in cases:
        tolerance = 1e-3 if case.startswith("zo_taylor") else 1e-5
        for name, scores in one_process[case]["scores"].items():
            for rank in fsdp2:
                error = (rank[case]["scores"][name] - scores).abs().max()
                assert error <= tolerance * scores.max(), (case, name)
                assert torch.equal(rank[case]["index"][name], one_process[case]["index"][name]), (
                    case,
                    name,
                )


def test_rows_of_a_base_sharded_by_fsdp2_are_read_and_written(fsdp2, one_process):
    expected = one_process["rewritten"]
    for rank in fsdp2:
        for kind in ("before", "after", "untouched"):
            for name, rows in expected[kind].items():
                assert torch.equal(rank["rewritten"][kind][name], rows), (kind, name)
        assert rank["rewritten"]["loss"].item() == pytest.approx(expected["loss"].item(), rel=1e-5)


@pytest.fixture(scope="module")
def unused(tmp_path_factory):
    return launch("shards_worker.py", tmp_path_factory.mktemp("unused"), 2, "unused")


@pytest.mark.parametrize("metric", ["group_taylor", "taylor"])
def test_a_layer_that_runs_on_one_process_only(unused, metric):
    for rank in unused:
        assert rank[metric]["silent"] == []
        for name, scores in rank[metric]["scores"].items():
            expected = unused[0]["expected"][metric][name]
            assert (scores - expected).abs().max() <= 1e-5 * expected.max(), name
            assert torch.equal(scores, unused[0][metric]["scores"][name])


def test_accumulators_take_a_share_of_the_weights_on_each_process(tmp_path):
    """At most 4 bytes a targeted weight over the number of processes, and padding; twice that while
    halves are compared. Beside them one layer's gradient, transients included."""
    world = 2
    for rank in launch("shards_worker.py", tmp_path, world, "memory"):
        blocks = [-(-size // world) for size in rank["sizes"]]
        for halves, extra in rank["extra"].items():
            accumulators = 4 * halves * sum(blocks)
            assert 0.9 * accumulators <= extra <= accumulators + 4 * world * max(blocks)

"""Real processes on gloo. Whatever goes wrong on rank 1, all processes end
in time, with an exit code that is not 0, and a survivor says that it was rank 1 and why: other
settings, other values (before they are saved), an exception, SIGKILL, a hang. The next start
resumes, and the run gives the bits of one that nothing disturbed."""

from __future__ import annotations

import signal

import pytest
import torch
from forked import Ended, run

from trainer_ext.run_guard.watchdog import EXIT_CODE


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, run("guard_worker.py", folder, 2, "whole")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("killed")
    return folder, run("guard_worker.py", folder, 2, "killed")


def spoken(rank: Ended) -> list[str]:
    return [line for line in rank.stderr.splitlines() if line.startswith("axolotl-spft:")]


def test_other_settings_are_refused_on_every_rank(whole):
    for rank in whole[1]:
        assert "refused: rank 1 (" in rank.stderr
        assert "learning_rate is 0.02 there and 0.01 on the others" in rank.stderr


def test_other_values_are_refused_before_they_are_saved(whole):
    folder, ranks = whole
    for rank in ranks:
        line = next(x for x in rank.stderr.splitlines() if "holds other values" in x)
        assert line.startswith("refused: rank 1 (")
        assert "model.layers.0.self_attn.q_proj than the others at step 2" in line
    assert not list((folder / "corrupted").glob("checkpoint-*"))


def test_an_exception_ends_the_others_with_its_reason(whole):
    zero, one = whole[1]
    assert zero.code != 0
    assert one.code != 0
    for rank in (zero, one):
        last = rank.stderr.rstrip().splitlines()[-1]
        assert last.startswith("axolotl-spft: rank 1 (")
        assert "raised RuntimeError: the data is gone, at step 3" in last
        assert set(spoken(rank)) == {last}  # of the runs before nobody speaks


def test_a_killed_process_is_named(killed):
    zero, one = killed[1]
    assert one.code == -signal.SIGKILL
    assert zero.code != 0
    last = zero.stderr.rstrip().splitlines()[-1]
    assert last.startswith("axolotl-spft: rank 1 (")
    assert "has died or cannot be reached" in last


def test_the_next_start_resumes(killed, whole):
    folder, _ = killed
    ended = run("guard_worker.py", folder, 2, "resumed")
    assert [rank.code for rank in ended] == [0, 0], ended[0].stderr[-3000:]
    assert not any(spoken(rank) for rank in ended)
    for rank in range(2):
        resumed, undisturbed = ended[rank].result, whole[1][rank].result
        assert all(torch.equal(resumed[name], value) for name, value in undisturbed.items())


def test_a_hanging_process_is_named_and_shows_where(tmp_path):
    ranks = run("guard_worker.py", tmp_path, 3, "hanging")
    for rank in ranks:
        assert rank.code in (1, EXIT_CODE)
        line = spoken(rank)[0]
        assert line.startswith("axolotl-spft: rank 1 (")
        assert "hangs: at step 3 (training)" in line
    assert "axolotl-spft: rank 1 stands here:" in ranks[1].stderr
    assert "time.sleep" in ranks[1].stderr
    assert "stands here" not in ranks[0].stderr + ranks[2].stderr

"""Wherever a process is killed (SIGKILL), in the calibration, in training, while any file of a
checkpoint is written or an older one is removed: the next start goes on from the last complete
checkpoint, and the final adapter is the undisturbed run's bit for bit."""

from __future__ import annotations

import signal

import pytest
from engine_runs import finish, same_bits, start

from trainer_ext.checkpoints.folders import what_is_missing

OPTIONS = {
    "steps": 8,
    "arguments": {"save_strategy": "steps", "save_steps": 3, "save_total_limit": 1},
}
# engine, rank, where, steps that the next start has to do
DEATHS = [
    ("ddp", 1, "calibration 1", 8),
    ("ddp", 0, "step 5", 5),
    ("ddp", 0, "write 0", 5),  # the mark of an incomplete checkpoint
    ("ddp", 0, "torn 2", 5),  # the adapter
    ("ddp", 0, "write 5", 5),  # the optimizer's state
    ("ddp", 1, "torn 0", 5),  # the random state of rank 1
    ("ddp", 0, "write 9", 5),  # the mark of a complete one
    ("ddp", 0, "rotate 2", 2),
    ("zero2", 1, "step 7", 2),
    ("zero2", 0, "torn 5", 5),
    ("zero3", 0, "calibration 3", 8),
    ("zero3", 1, "step 2", 8),
    ("zero3", 0, "write 2", 5),
    ("zero3", 0, "torn 7", 5),
    ("fsdp2", 1, "calibration 0", 8),
    ("fsdp2", 0, "step 4", 5),
    ("fsdp2", 0, "torn 8", 5),  # the trainer's state
]


@pytest.fixture(scope="module")
def undisturbed(base, tmp_path_factory):
    runs: dict = {}

    def of(engine: str):
        if engine not in runs:
            out = tmp_path_factory.mktemp(engine) / "out"
            runs[engine] = finish(engine, 2, base, out, **OPTIONS)
        return runs[engine]

    return of


@pytest.mark.parametrize(("engine", "rank", "where", "left"), DEATHS)
def test_the_next_start_ends_with_the_same_bits(
    base, undisturbed, tmp_path, engine, rank, where, left
):
    out = tmp_path / "out"
    ended = start(engine, 2, base, out, die=where, die_rank=rank, grace=1, **OPTIONS)
    assert ended[rank].code == -signal.SIGKILL
    assert all(e.code and e.result is None for e in ended)
    resumed = finish(engine, 2, base, out, resume="auto", **OPTIONS)
    assert [r["steps"] for r in resumed.ranks] == [left, left]
    assert same_bits(resumed.adapter, undisturbed(engine).adapter)
    # save_total_limit: 1, and the newest one is whole
    assert what_is_missing(out / "checkpoint-8") is None
    assert not (out / "checkpoint-3").exists()

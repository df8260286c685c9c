"""What each of two processes holds. Gradients of the compact rows when a step is made: all under
DDP, half under ZeRO and FSDP2, within padding (ZeRO-1 has them whole until they are reduced, once a
step; values, masters and moments: test_traffic). Under ZeRO-3, where the
engine is told to keep nothing, no process ever has more than one layer's weight whole in the
calibration, and none afterwards; saving takes the process that does not write three fp32 copies of
the largest compact tensor (values go alone, both moments together) beside what it sends."""

from __future__ import annotations

import json

import pytest
from forked import launch

WORLD = 2
FP32 = 4


@pytest.fixture(scope="module")
def shares(base, tmp_path_factory):
    found: dict = {}

    def of(engine: str, **config):
        key = (engine, *config.items())
        if key not in found:
            folder = tmp_path_factory.mktemp(engine)
            options = {"base": str(base), "out": str(folder / "out"), "steps": 2, "config": config}
            arguments = (engine, json.dumps(options))
            found[key] = launch("shares_worker.py", folder, WORLD, *arguments)
        return found[key]

    return of


@pytest.mark.parametrize(
    ("engine", "share"),
    [("ddp", 1), ("zero1", WORLD), ("zero2", WORLD), ("zero3_streamed", WORLD), ("fsdp2", WORLD)],
)
def test_gradients_are_divided(shares, engine, share):
    for rank in shares(engine):
        numel = rank["numel"]
        padding = WORLD * len(numel) if engine != "fsdp2" else 0  # r = 4 is divided evenly
        for held in rank["gradients"]:
            assert sum(numel) / share <= held / FP32 <= sum(numel) / share + padding
        assert rank["gradients"]


@pytest.mark.parametrize("importance", ["group_taylor", "taylor", "wanda", "magnitude"])
def test_zero3_calibrates_with_one_layer_at_a_time(shares, importance):
    for rank in shares("zero3_streamed", importance=importance):
        if importance != "magnitude":  # which runs no forward
            assert rank["looks"] >= 2 * rank["layers"]
        assert rank["most_whole"] == (importance != "magnitude")
        assert rank["whole_after"] == 0


def test_saving_gathers_one_compact_tensor_at_a_time(shares):
    for rank in shares("zero3_streamed")[1:]:
        assert 0 < rank["saving"] <= 4 * FP32 * max(rank["numel"])

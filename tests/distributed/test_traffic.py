"""What training and calibration send, counted call by call in 2 and 4 processes on gloo, is what
benchmarks/scaling_bytes.py says, to the byte and by kind of collective: one steady step and one
whole calibration under DDP, ZeRO-1, ZeRO-2, ZeRO-3 (every parameter partitioned and given up after
each use) and FSDP2, r no multiple of the processes. All processes count the same.

- No gradient of a base weight is ever sent in training: the reductions hold the compact rows alone,
  and a base twice as large with the same inputs changes nothing of a step under DDP. The counter
  would see them: full fine-tuning sends all of them.
- A process holds what benchmarks/scaling_memory.py says: base, compact rows, moments, DeepSpeed's
  fp32 copies and the kept rows; under FSDP2, whose last processes have the padding, at most.
- The Trainer's and the engines' own bookkeeping is named and counted, and small. DeepSpeed's checks
  of its first passes, which a calibration is, are bounded, and so is what the guard compares.
"""

from __future__ import annotations

import json
import os
from collections import Counter

import pytest
from forked import launch
from scaling import COUNTED
from scaling_bytes import (
    FP32,
    INT64,
    calibration_payload,
    ddp_buffers,
    step_bookkeeping,
    step_payload,
)
from scaling_memory import memory
from scaling_model import numel
from traffic import Collective, bytes_by_kind, object_exchanges
from traffic_worker import BATCHES, DIRECTIONS, FAMILIES, Case

CASES = [case for cases in FAMILIES.values() for case in cases]
WORLDS = [2, pytest.param(4, marks=pytest.mark.full)]
# Which may be reused between forward and backward, so that formulas are bounds.
REUSED = [case for case in CASES if case.engine == "zero3"]


@pytest.fixture(scope="module")
def counts(tmp_path_factory):
    """Number of processes -> what each of them counted; one launch for each number."""
    found = {}

    def get(world: int) -> list[dict]:
        if world not in found:
            folder = tmp_path_factory.mktemp(f"traffic{world}")
            found[world] = launch("traffic_worker.py", folder, world, timeout=900)
        return found[world]

    return get


def counted(rank: dict, case: Case, span: str) -> dict[str, int]:
    calls = [Collective(**call) for call in rank[str(case)][span]]
    if span == "calibration":
        calls, _ = object_exchanges(calls)  # the guard's, whose settings' texts are a machine's own
    return bytes_by_kind(calls)


def expected_step(case: Case, world: int) -> dict[str, int]:
    run = case.run(world)
    expected = Counter(step_payload(case.model, run, case.method))
    return dict(expected + Counter(step_bookkeeping(case.model, run)))


def expected_calibration(case: Case, world: int) -> dict[str, int]:
    expected = calibration_payload(case.model, case.run(world), case.metric, BATCHES, DIRECTIONS)
    # the count of the first step's target tokens
    return {**expected, "all_gather": expected.get("all_gather", 0) + INT64 * world}


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_step_sends_what_the_formula_says(counts, case, world):
    for rank in counts(world):
        assert counted(rank, case, "step") == expected_step(case, world)


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", [case for case in CASES if case.method == "spft"], ids=str)
def test_a_calibration_sends_what_the_formula_says(counts, case, world):
    for rank in counts(world):
        found, expected = counted(rank, case, "calibration"), expected_calibration(case, world)
        if case.engine.startswith("zero3"):
            # DeepSpeed compares over the processes what its first passes visit: at most three
            # visits of each module in each of three passes
            checks = found.pop("broadcast") - expected.pop("broadcast", 0)
            assert 0 < checks <= 3 * 3 * INT64 * rank[str(case)]["modules"]
        if case in REUSED:
            assert found.pop("all_gather") < expected.pop("all_gather")
        assert found == expected


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", [case for case in CASES if case.method == "spft"], ids=str)
def test_the_guard_compares_settings_and_neurons_once(counts, case, world):
    for rank in counts(world):
        calls = [Collective(**call) for call in rank[str(case)]["calibration"]]
        sizes, settings, more_sizes, neurons = object_exchanges(calls)[1]
        assert sizes == more_sizes == Collective("all_gather", INT64 * world, "int64")
        assert settings.nbytes <= 3000 * world
        assert neurons.nbytes <= (100 * len(case.model.linears) + 200) * world


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", [case for case in CASES if case.method == "spft"], ids=str)
def test_only_compact_rows_are_reduced_in_training(counts, case, world):
    bound = numel(case.model.compact, rows_of=world) * FP32 * case.accumulation
    assert bound * 2 < numel(case.model.base) * FP32 * case.accumulation
    for rank in counts(world):
        step = counted(rank, case, "step")
        assert set(step) <= {"all_reduce", "reduce_scatter", "all_gather", "broadcast"}
        small = step_bookkeeping(case.model, case.run(world)).get("all_reduce", 0)
        assert step.get("reduce_scatter", 0) + step.get("all_reduce", 0) <= bound + small


@pytest.mark.parametrize("world", WORLDS)
def test_a_larger_base_does_not_change_a_step_under_ddp(counts, world):
    tiny, wide, full = Case("ddp"), Case("ddp", size="wide"), Case("ddp", method="full")
    assert numel(wide.model.base) > 2 * numel(tiny.model.base)
    for rank in counts(world):
        assert counted(rank, wide, "step") == counted(rank, tiny, "step")
        assert counted(rank, full, "step")["all_reduce"] == FP32 * numel(full.model.base)


@pytest.mark.parametrize("world", WORLDS)
def test_which_neurons_are_selected_is_not_sent_under_ddp(counts, world):
    """Of the buffers only those of the base, which full fine-tuning broadcasts too."""
    spft, full = Case("ddp"), Case("ddp", method="full")
    for rank in counts(world):
        sent = counted(rank, spft, "step")["broadcast"]
        assert sent == counted(rank, full, "step")["broadcast"] == ddp_buffers(spft.model)


@pytest.mark.parametrize("world", WORLDS)
def test_all_parameters_are_broadcast_once_at_the_start(counts, world):
    for case in (Case("ddp"), Case("zero1", accumulation=2), Case("zero2", accumulation=2)):
        parameters = FP32 * (numel(case.model.base) + numel(case.model.compact))
        # DDP compares shapes and sends the rotary frequencies
        beside = 500 if case.engine == "ddp" else 0
        for rank in counts(world):
            sent = counted(rank, case, "start")["broadcast"]
            assert parameters <= sent <= parameters + beside


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", [case for case in CASES if case.method == "spft"], ids=str)
def test_a_process_holds_what_the_formula_says(counts, case, world):
    expected = memory(case.model, case.run(world))
    assert expected["moments"] > 0
    held = [rank[str(case)]["held"] for rank in counts(world)]
    for rank in held:
        assert set(rank) == {"base", "values", "master", "moments", "kept"}
        for part, nbytes in rank.items():
            if case.engine == "fsdp2":
                assert nbytes <= expected[part]
            else:
                assert nbytes == expected[part], part
    if case.engine == "fsdp2":
        assert sum(rank["base"] for rank in held) == FP32 * numel(case.model.base)
        assert sum(rank["moments"] for rank in held) == 2 * FP32 * numel(case.model.compact)


@pytest.mark.parametrize("world", WORLDS)
def test_the_committed_figures_are_those_counted(counts, world):
    """SPFT_RECORD_TRAFFIC=1 python -m pytest -m "" tests/distributed/test_traffic.py: new ones."""
    rows = []
    for case in CASES:
        rank = counts(world)[0]
        expectations = {"step": expected_step(case, world)}
        if case.method == "spft" and case not in REUSED:
            expectations["calibration"] = expected_calibration(case, world)
        for span, expected in expectations.items():
            found = counted(rank, case, span)
            if span == "calibration" and case.engine.startswith("zero3"):
                found["broadcast"] = expected.get("broadcast", 0)  # the checks are left out
            rows.append(
                {
                    "case": str(case),
                    "world": str(world),
                    "span": span,
                    "counted": sum(found.values()),
                    "formula": sum(expected.values()),
                }
            )
    committed = json.loads(COUNTED.read_text()) if COUNTED.is_file() else []
    if os.environ.get("SPFT_RECORD_TRAFFIC"):
        committed = [row for row in committed if row["world"] != str(world)] + rows
        committed.sort(key=lambda row: int(row["world"]))
        COUNTED.parent.mkdir(exist_ok=True)
        COUNTED.write_text(json.dumps(committed, indent=1) + "\n")
    assert [row for row in committed if row["world"] == str(world)] == rows

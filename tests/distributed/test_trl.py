"""Under DDP, ZeRO-2, ZeRO-3 and FSDP2, real processes on gloo, SFT and DPO select the neurons of
one process and have its losses. DPO's reference is the model that training started from: every
logged loss is that of the formula written out on plain dense models in fp64, mean over all
processes' micro-batches, from zero and non-zero deltas, with the reference computed or precomputed.
The workers assert engine, stage and world size."""

from __future__ import annotations

import math

import pytest
import torch
from forked import launch
from preferences import dpo_loss, updated
from tiny_models import tiny_model
from trl_runs import pairs
from trl_worker import DPO_RUNS, PAIRS, train

CORE = ["ddp", "zero3"]
REST = ["zero2", "fsdp2"]
ENGINES = [*CORE, *(pytest.param(engine, marks=pytest.mark.full) for engine in REST)]
# a log-probability near 5 in fp32, summed over some 30 tokens of four rows, times beta; and
# as much again for the order of an engine's sums
TOLERANCE = 2 * 5 * 2**-23 * 30 * 4 * 0.1


@pytest.fixture(scope="module", params=ENGINES)
def ranks(request, tmp_path_factory):
    engine = request.param
    folder = tmp_path_factory.mktemp(engine)
    pairs().save_to_disk(folder / PAIRS)
    return launch("trl_worker.py", folder, 2, engine)


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    folder = tmp_path_factory.mktemp("one")
    pairs().save_to_disk(folder / PAIRS)
    return {kind: train(folder, "none", kind, world=1) for kind in ("sft", "fresh")}


@pytest.mark.parametrize("kind", ["sft", "fresh"])
def test_neurons_and_losses_are_those_of_one_process(ranks, one_process, kind):
    expected = one_process[kind]
    for rank in ranks:
        assert rank[kind]["losses"] == pytest.approx(expected["losses"], rel=1e-5)
        for name, index in expected["index"].items():
            assert torch.equal(rank[kind]["index"][name], index), name


@pytest.mark.parametrize("kind", DPO_RUNS)
def test_every_loss_is_the_formulas(ranks, kind):
    runs = [rank[kind] for rank in ranks]
    index = runs[0]["index"]

    def model_with(deltas):
        return updated(tiny_model(), {name: (index[name], d) for name, d in deltas.items()})

    start = runs[0]["deltas"][0]
    is_zero = all(bool((delta == 0).all()) for delta in start.values())
    assert is_zero == (kind in ("fresh", "precomputed"))
    reference = model_with(start) if kind == "continued" else tiny_model().double()
    found = runs[0]["losses"]
    assert len(found) == len(runs[0]["deltas"]) == 3
    assert max(abs(loss - math.log(2)) for loss in found) > 100 * TOLERANCE
    for step, loss in enumerate(found):
        policy = model_with(runs[0]["deltas"][step])
        batches = [batch for run in runs for batch in run["batches"][step]]
        assert len(batches) == 2 * len(ranks)
        with torch.no_grad():
            expected = torch.stack([dpo_loss(policy, b, reference) for b in batches]).mean()
        assert abs(loss - expected.item()) <= TOLERANCE


def test_computed_or_precomputed_the_losses_are_the_same(ranks):
    assert ranks[0]["fresh"]["losses"] == pytest.approx(
        ranks[0]["precomputed"]["losses"], abs=TOLERANCE
    )

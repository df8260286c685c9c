"""A run is the same under every engine, from the base model's folder to the saved adapter: 20 steps
on the same global batches, real processes on gloo that assert engine, stage and world size.

fp32: the index sets of all processes are one process's, bit for bit; losses agree to 1e-5, and the
final adapters to 1e-4 of their norm. Adam's epsilon (1e-3) is far above gradient noise.

bf16 (unit roundoff u = 2^-8): losses agree to u. Two layers of four products forward and four
backward lie between the loss and the first layer's gradient, and their relative errors add up to
16 u at worst, which is what adapters may differ by. All processes hold the same index set, and
where it differs from one process's, the neurons' scores are within 16 u of each other."""

from __future__ import annotations

import pytest
import torch
from engine_runs import finish, relative_difference
from run_worker import scores_of

CORE = [("ddp", 2), ("zero2_offload", 2), ("zero3", 3), ("fsdp2_ram", 2)]
FULL = [
    ("zero1", 2),
    ("zero2", 2),
    ("zero3", 2),
    ("zero3_default", 2),
    ("zero3_offload", 2),
    ("fsdp2", 2),
    ("fsdp2", 3),
    ("fsdp2_sharded", 2),
]
CASES = [pytest.param(case, id=f"{case[0]}-{case[1]}") for case in CORE]
CASES += [pytest.param(case, id=f"{case[0]}-{case[1]}", marks=pytest.mark.full) for case in FULL]
U = 2.0**-8


@pytest.fixture(scope="module", params=[False, True], ids=["fp32", "bf16"])
def bf16(request):
    return request.param


@pytest.fixture(scope="module")
def one(base, bf16, tmp_path_factory):
    return finish("none", 1, base, tmp_path_factory.mktemp("one") / "out", bf16=bf16)


@pytest.fixture(scope="module", params=CASES)
def run(request, base, bf16, tmp_path_factory):
    engine, world = request.param
    return finish(engine, world, base, tmp_path_factory.mktemp(engine) / "out", bf16=bf16)


def test_one_process_learns(one):
    assert len(one.losses) == 20
    assert one.losses[-1] < one.losses[0] - 0.05


def test_every_process_selects_the_same_neurons(run, one, bf16):
    for rank in run.ranks:
        for name, index in run.index.items():
            assert torch.equal(rank["index"][name], index), name
    if not bf16:
        assert all(torch.equal(run.index[name], index) for name, index in one.index.items())
        return
    scores = scores_of(one.out)
    for name, index in one.index.items():
        here, there = set(run.index[name].tolist()), set(index.tolist())
        swapped = scores[name][sorted(here ^ there)]
        assert swapped.numel() == 0 or swapped.max() - swapped.min() <= 16 * U * swapped.max(), name


def test_losses_are_those_of_one_process(run, one, bf16):
    for rank in run.ranks:
        assert rank["losses"] == pytest.approx(one.losses, rel=U if bf16 else 1e-5)


def test_the_adapter_is_that_of_one_process(run, one, bf16):
    assert {t.dtype for n, t in run.adapter.items() if n.endswith("weight")} == {torch.float32}
    if all(torch.equal(run.index[name], index) for name, index in one.index.items()):
        assert relative_difference(run.adapter, one.adapter) <= (16 * U if bf16 else 1e-4)
    else:
        assert bf16

"""Runs whose neurons have an anchor end under every engine as in one process, on the same global
batches: from another adapter's values over a dense base with biases, and from the original rows
over 4- and 8-bit bases. Losses agree to 1e-5, adapters to 1e-4 of their norm, anchors bit for bit;
and an interrupted run goes on to the same bits. The workers assert engine, stage, world size."""

from __future__ import annotations

import pytest
import torch
from adapters import fill_deltas
from engine_runs import finish, relative_difference, same_bits, start
from peft import get_peft_model
from quantised import dense, save_base

from trainer_ext import SpftConfig, select_neurons

STEPS = 4


def cases(core, full):
    return [*core, *(pytest.param(case, marks=pytest.mark.full) for case in full)]


STARTED = cases(["ddp", "zero3"], ["zero2", "fsdp2", "fsdp2_ram"])
QUANTISED = cases(
    [("ddp", 4), ("zero3", 4)], [("ddp", 8), ("zero2", 4), ("zero3", 8), ("fsdp2", 4)]
)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"), "llama_bias", torch.float32)


@pytest.fixture(scope="module")
def from_sft(base, tmp_path_factory):
    """Configuration of an adapter that goes on from a trained one."""
    model = get_peft_model(dense(base), SpftConfig(r=4, importance="magnitude"))
    select_neurons(model)
    fill_deltas(model)
    folder = tmp_path_factory.mktemp("sft")
    model.save_pretrained(folder)
    return {"r": None, "start_adapter": str(folder)}


def run_and_resume(engine, base, out, **options):
    """A run in two processes, which goes on from its middle to the same bits."""
    saving = {"save_strategy": "steps", "save_steps": STEPS // 2}
    run = finish(engine, 2, base, out, steps=STEPS, arguments=saving, **options)
    middle = str(out / f"checkpoint-{STEPS // 2}")
    again = finish(engine, 2, base, out, steps=STEPS, resume=middle, **options)
    assert same_bits(again.adapter, run.adapter)
    return run


def compare(run, one):
    for rank in run.ranks:
        assert rank["losses"] == pytest.approx(one.losses, rel=1e-5)
    assert relative_difference(run.adapter, one.adapter) <= 1e-4
    anchors = [name for name in one.adapter if name.endswith("anchor")]
    assert anchors
    assert all(torch.equal(run.adapter[name], one.adapter[name]) for name in anchors)


@pytest.fixture(scope="module")
def one_started(base, from_sft, tmp_path_factory):
    return finish(
        "none", 1, base, tmp_path_factory.mktemp("one") / "out", steps=STEPS, config=from_sft
    )


@pytest.mark.parametrize("engine", STARTED)
def test_from_another_adapter(base, from_sft, one_started, tmp_path, engine):
    compare(run_and_resume(engine, base, tmp_path / "out", config=from_sft), one_started)


@pytest.fixture(scope="module")
def one_quantised(base, tmp_path_factory):
    ended = {}

    def one(bits):
        if bits not in ended:
            out = tmp_path_factory.mktemp(f"one{bits}") / "out"
            ended[bits] = finish("none", 1, base, out, steps=STEPS, bits=bits)
        return ended[bits]

    return one


@pytest.mark.parametrize("case", QUANTISED, ids=lambda case: f"{case[0]}-{case[1]}bit")
def test_over_a_quantised_base(base, one_quantised, tmp_path, case):
    engine, bits = case
    compare(run_and_resume(engine, base, tmp_path / "out", bits=bits), one_quantised(bits))


@pytest.mark.full
def test_8_bits_under_fsdp2_are_refused(base, tmp_path):
    for ended in start("fsdp2", 2, base, tmp_path / "out", steps=STEPS, bits=8):
        assert ended.code
        assert "in 8 bits, which bitsandbytes cannot compute with under plain FSDP2" in ended.stderr

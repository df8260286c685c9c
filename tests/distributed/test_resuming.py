"""A run that is resumed ends with the bits of one that was not interrupted, adapter and optimizer,
under every engine in fp32 and bf16; under another engine or number of processes it ends within
1e-5 of the undisturbed run (fp32; the optimizer's state goes along, since without it the difference
is a hundred times as large). Checkpoints hold the adapter and the optimizer's state and
nothing of the base model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from engine_runs import finish, relative_difference, same_bits, start
from safetensors.torch import load_file

from trainer_ext.checkpoints.folders import what_is_missing

SAVING = {"save_strategy": "steps", "save_steps": 3}
SAME = [
    ("ddp", 2, False),
    ("zero1", 2, True),
    ("zero2", 2, False),
    ("zero2_offload", 2, False),
    ("zero3", 2, False),
    ("zero3", 2, True),
    ("zero3_default", 2, False),
    ("zero3_offload", 2, True),
    ("fsdp2", 2, False),
    ("fsdp2_ram", 2, True),
]
OTHER = [("none", 1), ("ddp", 2), ("zero1", 2), ("zero3", 3), ("fsdp2", 2)]


def undisturbed(engine, world, base, out, **options):
    return finish(engine, world, base, out, steps=6, arguments=SAVING, **options)


def interrupted(run, out):
    """A copy of its output_dir as it was when the first checkpoint had been written."""
    shutil.copytree(run.out, out, ignore=shutil.ignore_patterns("checkpoint-6"))
    return out


@pytest.mark.parametrize(("engine", "world", "bf16"), SAME)
def test_the_same_engine_goes_on_with_the_same_bits(base, tmp_path, engine, world, bf16):
    whole = undisturbed(engine, world, base, tmp_path / "whole", bf16=bf16)
    out = interrupted(whole, tmp_path / "resumed")
    resumed = undisturbed(engine, world, base, out, bf16=bf16, resume=True)
    assert [rank["steps"] for rank in resumed.ranks] == [3] * world
    assert same_bits(resumed.adapter, whole.adapter)
    states = [
        torch.load(run.out / "checkpoint-6" / "optimizer.pt", weights_only=True)["state"]
        for run in (resumed, whole)
    ]
    assert states[0].keys() == states[1].keys() != set()
    assert all(same_bits(states[0][number], states[1][number]) for number in states[1])


@pytest.fixture(scope="module", params=[("none", 1), ("zero3", 2), ("fsdp2", 2)], ids=str)
def source(request, base, tmp_path_factory):
    engine, world = request.param
    return undisturbed(engine, world, base, tmp_path_factory.mktemp(engine) / "out")


@pytest.mark.parametrize(("engine", "world"), OTHER)
def test_another_engine_goes_on_from_it(source, base, tmp_path, engine, world):
    out = interrupted(source, tmp_path / "out")
    resumed = undisturbed(engine, world, base, out, resume=True)
    assert [rank["steps"] for rank in resumed.ranks] == [3] * world
    assert relative_difference(resumed.adapter, source.adapter) <= 1e-5
    assert resumed.losses == pytest.approx(source.losses, rel=1e-5)


def test_fresh_moments_are_told_from_saved_ones(source, base, tmp_path):
    """What the tolerance above would not let pass."""
    out = interrupted(source, tmp_path / "out")
    (out / "checkpoint-3" / "optimizer.pt").unlink()
    (out / "checkpoint-3" / "spft_checkpoint.json").unlink()  # taken at the user's word then
    resumed = undisturbed("zero3", 2, base, out, resume=str(out / "checkpoint-3"))
    assert relative_difference(resumed.adapter, source.adapter) > 1e-3


@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_the_best_checkpoint_is_loaded_in_the_end(base, tmp_path, engine):
    keys = {
        "eval_strategy": "steps",
        "eval_steps": 3,
        "load_best_model_at_end": True,
        "learning_rate": 5.0,  # it soon is worse than it was
        "lr_scheduler_type": "constant",
    }
    run = finish(engine, 2, base, tmp_path / "out", steps=9, arguments=SAVING | keys)
    state = json.loads((run.out / "checkpoint-9" / "trainer_state.json").read_text())
    best = Path(state["best_model_checkpoint"])
    assert best.name != "checkpoint-9"
    assert same_bits(run.adapter, load_file(best / "adapter_model.safetensors"))


def test_checkpoints_hold_nothing_of_the_base(source):
    folder = source.out / "checkpoint-6"
    assert what_is_missing(folder) is None
    trained = sum(4 * t.numel() for n, t in source.adapter.items() if n.endswith(".weight"))
    index = sum(8 * t.numel() for n, t in source.adapter.items() if n.endswith(".index"))
    layers = len([n for n in source.adapter if n.endswith(".weight")])
    # safetensors' header and torch's archive: names, shapes and records of each tensor
    adapter = (folder / "adapter_model.safetensors").stat().st_size
    assert adapter <= trained + index + 600 * layers + 1000
    assert (folder / "optimizer.pt").stat().st_size <= 2 * trained + 3000 * layers + 5000
    others = [p for p in folder.rglob("*") if p.suffix in (".bin", ".pt", ".safetensors", ".pth")]
    known = {"adapter_model.safetensors", "optimizer.pt", "scheduler.pt", "training_args.bin"}
    assert all(p.name in known or p.name.startswith("rng_state") for p in others)


def test_8_bit_moments_go_on_as_they_were_or_say_what_to_do(base, tmp_path):
    """All of them, since a process's share of this model has more than 4096 elements."""
    options = {
        "config": {"r": None, "density": 0.9},
        "arguments": SAVING | {"optim": "adamw_8bit"},
        "steps": 6,
    }
    whole = finish("zero2", 2, base, tmp_path / "whole", **options)
    out = interrupted(whole, tmp_path / "resumed")
    resumed = finish("zero2", 2, base, out, resume=True, **options)
    assert same_bits(resumed.adapter, whole.adapter)
    other = interrupted(whole, tmp_path / "other")
    for rank in start("zero2", 3, base, other, resume=True, **options):
        assert rank.code == 1
        assert "8-bit moments as 2 processes of ZeRO-2 had them, which 3 of ZeRO-2" in rank.stderr
        assert "lora_model_dir" in rank.stderr

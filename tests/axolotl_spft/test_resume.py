"""An interrupted run that is resumed ends bit-identical to one that was not interrupted.

Weights, index, optimizer state and the logged losses are compared; the resumed run must have
trained the remaining steps only, without calibrating again. Continuing from `lora_model_dir` starts
from the saved rows and keeps their neurons.
"""

from __future__ import annotations

import json

import pytest
import torch
from axolotl.utils.dict import DictDefault
from axolotl_runs import (
    adapter_tensors,
    layers_of,
    lora_yaml,
    own_process_state,
    same_batches,
    same_tensors,
    spft_yaml,
    train,
)
from transformers import TrainerCallback

from axolotl_spft import saved

LORA_KEYS = {"plugins": None, "adapter": "lora", "spft_r": None, "spft_calibration_batches": None}
STEPS, SAVED_AT, INTERRUPTED_AT = 6, 3, 5


class Interruption(Exception):
    pass


class _Interrupt(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == INTERRUPTED_AT:
            raise Interruption


def _long_run(assets, **changes) -> dict:
    keys = {
        "max_steps": STEPS,
        "save_strategy": "steps",
        "save_steps": SAVED_AT,
        "lr_scheduler": "cosine",
        "warmup_steps": 2,
        "weight_decay": 0.1,
        "overrides_of_model_config": {"attention_dropout": 0.2},
    }
    return spft_yaml(assets, **keys, **changes)


@pytest.mark.parametrize("how", ["resume_from_checkpoint", "auto_resume_from_checkpoints"])
@pytest.mark.parametrize(
    "data",
    [{}, {"gradient_accumulation_steps": 2}, {"micro_batch_size": 24}],
    ids=["padded", "accumulated", "three epochs"],
)
def test_resumed_run_equals_the_uninterrupted_one(assets, tmp_path, how, data):
    whole = train(_long_run(assets, **data), tmp_path / "whole")

    out = tmp_path / "out"
    value = True if how.startswith("auto") else str(out / f"checkpoint-{SAVED_AT}")
    resumed = _interrupt_and_resume(_long_run(assets, **data), out, {how: value})

    assert resumed.calibration == []
    assert len(resumed.batches) == len(whole.batches) * (STEPS - SAVED_AT) // STEPS
    assert resumed.losses == whole.losses
    assert same_tensors(resumed.tensors, whole.tensors)
    last = f"checkpoint-{STEPS}/optimizer.pt"
    assert _same(*(torch.load(run.out / last) for run in (whole, resumed)))
    assert _selection_of_report(resumed) == _selection_of_report(whole)
    first_half = adapter_tensors(out / f"checkpoint-{SAVED_AT}")
    assert not same_tensors(first_half, resumed.tensors), "nothing was trained after resuming"


def _interrupt_and_resume(config, out, resume):
    with pytest.raises(Interruption):
        train(config, out, lambda trainer: trainer.add_callback(_Interrupt))
    assert not (out / "spft_report.json").exists()
    return train({**config, **resume}, out)


def test_resuming_with_packing_is_that_of_lora(assets, tmp_path):
    """Axolotl 0.19 packs anew after resuming, so no adapter's run equals the uninterrupted one."""
    keys = {"sample_packing": True, "micro_batch_size": 1}
    resume = {"auto_resume_from_checkpoints": True}
    spft = _interrupt_and_resume(_long_run(assets, **keys), tmp_path / "spft", resume)
    config = lora_yaml(assets, **{**_long_run(assets, **keys), **LORA_KEYS})
    lora = _interrupt_and_resume(config, tmp_path / "lora", resume)
    assert same_batches(spft.batches, lora.batches)
    assert len(spft.batches) == STEPS - SAVED_AT
    assert spft.calibration == []
    before = layers_of(adapter_tensors(spft.out / f"checkpoint-{SAVED_AT}"))
    for name, layer in layers_of(spft.tensors).items():
        assert torch.equal(layer["index"], before[name]["index"])
        assert not torch.equal(layer["weight"], before[name]["weight"])


def _same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(_same, a, b))
    return a == b


def _selection_of_report(run) -> dict:
    report = json.loads((run.out / "spft_report.json").read_text())
    return {"layers": report["layers"], "batches": report["calibration"]["batches"]}


@pytest.fixture(scope="module")
def first(assets, tmp_path_factory):
    """A run whose adapter others continue from."""
    with own_process_state():
        config = spft_yaml(assets, max_steps=3, learning_rate=0.1, spft_r=5)
        return train(config, tmp_path_factory.mktemp("first") / "out")


def test_continuing_starts_from_the_saved_rows(assets, tmp_path, first):
    config = spft_yaml(assets, spft_r=None, lora_model_dir=str(first.out), learning_rate=0.0)
    still = train(config, tmp_path / "still")
    assert same_tensors(still.tensors, first.tensors)


def test_continuing_trains_the_same_neurons(assets, tmp_path, first):
    """Also where the YAML still has a lora_r that would mean another number of neurons."""
    config = spft_yaml(assets, spft_r=None, lora_r=4, lora_model_dir=str(first.out))
    more = train(config, tmp_path / "more")
    assert more.calibration == []
    before = layers_of(first.tensors)
    for name, layer in layers_of(more.tensors).items():
        assert torch.equal(layer["index"], before[name]["index"])
        assert not torch.equal(layer["weight"], before[name]["weight"])
    assert more.losses[0] < first.losses[0], "training began from the base model again"


def test_continuing_from_a_checkpoint_folder_with_its_own_r(assets, tmp_path, first):
    config = spft_yaml(assets, max_steps=1, save_strategy="steps", save_steps=1)
    checkpoint = train(config, tmp_path / "source").out / "checkpoint-1"
    more = train({**config, "lora_model_dir": str(checkpoint)}, tmp_path / "more")
    before = layers_of(adapter_tensors(checkpoint))
    assert all(
        torch.equal(layer["index"], before[name]["index"])
        for name, layer in layers_of(more.tensors).items()
    )


def test_continuing_with_another_adapter_budget_leaves_the_old_folder_alone(
    assets, tmp_path, first
):
    """The saved folder is input: continuing into another output_dir does not write to it."""
    before = {p.name: p.stat().st_mtime_ns for p in first.out.iterdir()}
    train(spft_yaml(assets, spft_r=5, lora_model_dir=str(first.out)), tmp_path / "more")
    assert {p.name: p.stat().st_mtime_ns for p in first.out.iterdir()} == before


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({}, []),
        ({"spft_importance": "group_taylor"}, []),
        ({"spft_importance": "random"}, ["spft_importance"]),
        (
            {"spft_target_modules": ["q_proj"], "spft_exclude_modules": ["o_proj"]},
            ["spft_target_modules", "spft_exclude_modules"],
        ),
    ],
)
def test_keys_that_have_no_say_over_a_continued_adapter_are_named(
    first, monkeypatch, changes, named
):
    warnings = []
    monkeypatch.setattr(saved.logger, "warning", lambda text, *args: warnings.append(text % args))
    saved.check_continued_adapter(DictDefault({"lora_model_dir": str(first.out), **changes}))
    assert len(warnings) == bool(named)
    for key in ("spft_importance", "spft_target_modules", "spft_exclude_modules"):
        assert any(key in text for text in warnings) == (key in named)

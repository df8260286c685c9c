"""A trainer's run writes the update into the base weights while it trains and leaves W0 behind,
also when it is broken off; its checkpoints, resuming and results are the delta path's."""

from __future__ import annotations

import pytest
import torch
from adapters import wrapped
from safetensors.torch import load_file
from tiny_models import batch, dataset, tiny_model
from training_arguments import arguments
from transformers import Trainer, TrainerCallback
from written import is_base

from trainer_ext import SpftCallback, SpftConfig, SpftError, SpftTrainer, restore_base
from trainer_ext.tuner.model import deltas, spft_layers

# An epsilon well above gradient noise, so that rounding stays rounding.
SETTINGS = {"max_steps": 6, "adam_epsilon": 1e-3}


class Watch(TrainerCallback):
    """Notes whether the rows are written, and can break a run off."""

    def __init__(self, break_at=None):
        self.break_at = break_at
        self.written: list[set[bool]] = []
        self.trainer = None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        layers = spft_layers(model).values()
        self.written.append({layer.written is not None for layer in layers})
        if state.global_step == self.break_at:
            raise KeyboardInterrupt


def trainer(folder, forward="auto", break_at=None, **more) -> tuple[Trainer, Watch]:
    model = wrapped(importance="group_taylor", calibration_batches=2, forward=forward)
    data = dataset(24)
    watch = Watch(break_at)
    run = Trainer(
        model,
        arguments(folder, **{**SETTINGS, **more}),
        train_dataset=data,
        eval_dataset=data[:8],
        callbacks=[watch],
    )
    run.add_callback(SpftCallback(run))
    return run, watch


def losses(run, key="loss") -> list[float]:
    return [entry[key] for entry in run.state.log_history if key in entry]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_run_writes_through_and_equals_the_delta_paths(tmp_path, checkpointing):
    more = {"eval_strategy": "steps", "eval_steps": 2, "gradient_checkpointing": checkpointing}
    ours, watch = trainer(tmp_path / "a", **more)
    theirs, other = trainer(tmp_path / "b", forward="delta", **more)
    ours.train()
    theirs.train()
    assert watch.written == [{True}] * 6
    assert other.written == [{False}] * 6
    torch.testing.assert_close(losses(ours), losses(theirs), rtol=1e-6, atol=0)
    torch.testing.assert_close(
        losses(ours, "eval_loss"), losses(theirs, "eval_loss"), rtol=1e-6, atol=0
    )
    for name, delta in deltas(ours.model).items():
        other = deltas(theirs.model)[name].weight
        assert (delta.weight - other).norm() <= 1e-5 * other.norm()
    assert is_base(ours.model)


def test_a_broken_off_run_leaves_a_right_model_and_resumes(tmp_path):
    whole, _ = trainer(tmp_path / "whole", save_strategy="steps", save_steps=2)
    whole.train()
    broken, _ = trainer(tmp_path / "broken", break_at=5, save_strategy="steps", save_steps=2)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    model = broken.model.eval()
    with torch.no_grad():
        written = model(**batch()).logits
        restore_base(model)
        assert is_base(model)
        torch.testing.assert_close(model(**batch()).logits, written, rtol=1e-5, atol=1e-5)
    resumed, watch = trainer(tmp_path / "broken", save_strategy="steps", save_steps=2)
    resumed.train(resume_from_checkpoint=True)
    assert watch.written == [{True}] * 2
    for name, delta in deltas(resumed.model).items():
        assert torch.equal(delta.weight, deltas(whole.model)[name].weight)
    assert is_base(resumed.model)


def test_checkpoints_saved_while_written_hold_the_adapter_alone(tmp_path):
    run, _ = trainer(tmp_path, save_strategy="steps", save_steps=6)
    run.train()
    saved = load_file(tmp_path / "checkpoint-6" / "adapter_model.safetensors")
    for name, delta in deltas(run.model).items():
        key = next(k for k in saved if name in k and k.endswith("spft_delta.weight"))
        assert torch.equal(saved[key], delta.weight)
    assert all(".spft_delta." in key for key in saved)


def test_the_best_checkpoint_is_what_the_run_ends_with(tmp_path):
    run, _ = trainer(
        tmp_path,
        learning_rate=0.5,
        eval_strategy="steps",
        save_strategy="steps",
        eval_steps=2,
        save_steps=2,
        load_best_model_at_end=True,
    )  # diverges: the first checkpoint is the best
    run.train()
    best = min(losses(run, "eval_loss"))
    assert run.evaluate()["eval_loss"] == pytest.approx(best, rel=1e-5)
    assert is_base(run.model)


def test_a_run_can_train_again(tmp_path):
    run, watch = trainer(tmp_path)
    run.train()
    run.train()
    assert watch.written == [{True}] * 12
    assert is_base(run.model)


def test_write_through_by_name_is_refused_where_a_weight_is_shared(tmp_path):
    base = tiny_model()
    base.model.layers[1].mlp.up_proj.weight = base.model.layers[0].mlp.up_proj.weight
    config = SpftConfig(r=4, importance="random", forward="write_through")
    run = SpftTrainer(base, arguments(tmp_path), train_dataset=dataset(8), spft_config=config)
    with pytest.raises(SpftError, match="forward is 'write_through'"):
        run.train()

"""A run of SpftTrainer on the device that is broken off and resumed is bit-identical to the whole
one: neurons, deltas, moments and losses, with activation checkpointing and without, and afterwards
the base weights are W0.

No tolerance: `full_determinism` lets torch take deterministic kernels only, and refuse others. What
it sets for the whole process is put back."""

from __future__ import annotations

import os

import pytest
import torch
from devices import DEVICE
from optimizers import same_bits, state_of
from tiny_models import dataset, tiny_model
from training_arguments import arguments
from transformers import TrainerCallback
from written import is_base

from trainer_ext import SpftConfig, SpftTrainer
from trainer_ext.tuner.model import deltas

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def own_settings():
    """What `full_determinism` changes, put back."""
    environment = dict(os.environ)
    cudnn = torch.backends.cudnn
    flags = cudnn.deterministic, cudnn.benchmark
    mode = torch.get_deterministic_debug_mode()
    yield
    torch.set_deterministic_debug_mode(mode)
    cudnn.deterministic, cudnn.benchmark = flags
    os.environ.clear()
    os.environ.update(environment)


class Interrupt(TrainerCallback):
    """Ends the run as an exception does, between two checkpoints."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


def trainer(folder, dtype=torch.float32, callbacks=(), **more) -> SpftTrainer:
    options = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 2,
        "weight_decay": 0.1,
        "full_determinism": True,
        "use_cpu": DEVICE == "cpu",
        **more,
    }
    return SpftTrainer(
        tiny_model(dtype=dtype),
        arguments(folder, **options),
        train_dataset=dataset(),
        spft_config=SpftConfig(r=4, calibration_batches=3),
        callbacks=list(callbacks),
    )


def losses(run) -> list[float]:
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {}),
        (torch.float32, {"gradient_checkpointing": True}),
        (torch.float32, {"bf16": True}),
        (torch.bfloat16, {"gradient_checkpointing": True}),
    ],
    ids=["fp32", "checkpointing", "autocast", "bf16_base"],
)
def test_a_resumed_run_is_bit_identical(tmp_path, dtype, options):
    whole = trainer(tmp_path / "whole", dtype, **options)
    whole.train()
    assert torch.are_deterministic_algorithms_enabled()
    stopped = trainer(tmp_path / "stopped", dtype, callbacks=[Interrupt()], **options)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = trainer(tmp_path / "stopped", dtype, **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    ours, theirs = deltas(whole.model), deltas(resumed.model)
    for name, delta in ours.items():
        assert delta.weight.device.type == DEVICE
        assert delta.weight.abs().max() > 0
        assert torch.equal(theirs[name].index, delta.index)
        assert torch.equal(theirs[name].weight, delta.weight)
    assert same_bits(state_of(whole.optimizer), state_of(resumed.optimizer))
    assert len(losses(whole)) == 6
    assert losses(resumed) == losses(whole)
    assert is_base(whole.model, dtype=dtype)
    assert is_base(resumed.model, dtype=dtype)

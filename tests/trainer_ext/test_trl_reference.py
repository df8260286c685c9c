"""DPO's reference is the model with delta off, never a second model: at every step every loss is
that of the formula written out on plain dense models in fp64, whether the reference is computed or
precomputed, and whether rows are written or not. Where a trained adapter is continued
by TRL's own copy of it ("ref"), the reference is the model that training started from."""

from __future__ import annotations

import math

import pytest
import torch
from adapters import fill_deltas, trained, wrapped
from preferences import dpo_loss, updated
from tiny_models import tiny_model
from transformers import TrainerCallback
from trl import DPOConfig
from trl_runs import arguments, losses, pairs, tokenizer

from trainer_ext import SpftConfig, SpftDPOTrainer, select_neurons
from trainer_ext.tuner.model import deltas, spft_layers

# A log-probability near 5 in fp32, summed over some 30 tokens of four rows, times beta
TOLERANCE = 5 * 2**-23 * 30 * 4 * 0.1


def compact(model) -> dict:
    return {n: (d.index.clone(), d.weight.detach().clone()) for n, d in deltas(model).items()}


class Noting(SpftDPOTrainer):
    """Keeps each micro-batch that it trains or evaluates on, with the deltas of that moment."""

    notes: list = []  # not the instance's: calibration would put it back

    def compute_loss(self, model, inputs, *args, **kwargs):
        written = {layer.written is not None for layer in spft_layers(model).values()}
        note = {**inputs, "deltas": compact(model), "written": written}
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.notes.append({**note, "loss": loss.item()})
        return loss


class EvaluatesInTheMiddle(TrainerCallback):
    """On pairs that the trainer has not seen, while rows of the base are written."""

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.evaluate(pairs(8).select(range(4, 8)))


def make(folder, model=None, spft_config=None, **more) -> Noting:
    run = Noting(
        model or tiny_model(),
        args=arguments(DPOConfig, folder, **more),
        train_dataset=pairs(),
        processing_class=tokenizer,
        spft_config=spft_config,
    )
    run.notes = []
    callback = EvaluatesInTheMiddle()
    callback.trainer = run
    run.add_callback(callback)
    return run


def assert_losses_are_the_formulas(run, start: dict | None = None) -> None:
    assert len(run.notes) == 3 * 3  # of each step two micro-batches and an evaluation
    reference = updated(tiny_model(), start or {})
    # far from a policy that is its own reference, whose loss is log 2
    assert max(abs(note["loss"] - math.log(2)) for note in run.notes) > 1e3 * TOLERANCE
    for note in run.notes:
        policy = updated(tiny_model(), note["deltas"])
        with torch.no_grad():
            expected = dpo_loss(policy, note, reference).item()
        assert abs(note["loss"] - expected) <= TOLERANCE


def fresh(forward: str, **fields) -> SpftConfig:
    return SpftConfig(**{"r": 4, "calibration_batches": 2, "forward": forward, **fields})


def filled(run) -> Noting:
    """As after some training; the neurons are selected."""
    select_neurons(run.model)
    fill_deltas(run.model)
    return run


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("forward", ["write_through", "delta"])
@pytest.mark.parametrize("start", ["fresh", "filled"])
def test_the_reference_is_delta_off(tmp_path, start, forward, precompute):
    config = fresh(forward, importance="random" if start == "filled" else "group_taylor")
    run = make(tmp_path, spft_config=config, precompute_ref_log_probs=precompute)
    if start == "filled":
        filled(run)
    run.train()
    assert run.ref_model is None
    assert list(run.model.peft_config) == ["default"]
    assert_losses_are_the_formulas(run)
    assert {w for note in run.notes for w in note["written"]} == {forward == "write_through"}


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("forward", ["write_through", "delta"])
def test_a_continued_adapter_is_its_own_reference(tmp_path, forward, precompute):
    model = trained(forward=forward)
    start = compact(model)
    run = make(tmp_path, model, precompute_ref_log_probs=precompute)
    run.train()
    assert run.ref_model is None
    assert_losses_are_the_formulas(run, start)
    assert run.notes[1]["loss"] == pytest.approx(math.log(2), abs=TOLERANCE)


def test_both_ways_of_trl_give_the_same_losses(tmp_path):
    """A fresh adapter's copy is the base model too."""
    fields = {"r": 4, "importance": "group_taylor", "calibration_batches": 2}
    by_config = make(tmp_path / "a", spft_config=SpftConfig(**fields))
    by_copy = make(tmp_path / "b", wrapped(**fields))
    for run in (by_config, by_copy):
        run.train()
    assert list(by_copy.model.peft_config) == ["default", "ref"]
    assert losses(by_config) == losses(by_copy)


@pytest.mark.parametrize("way", ["spft_config", "continued"])
def test_resuming_is_bit_identical(tmp_path, way):
    def run(folder, resume=False):
        options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 3}
        if way == "spft_config":
            made = make(tmp_path / folder, spft_config=fresh("auto"), **options)
        else:
            made = make(tmp_path / folder, trained(), **options)
        made.train(resume_from_checkpoint=resume)
        return made

    whole = run("a")
    resumed = run("a", resume=str(tmp_path / "a" / "checkpoint-2"))
    assert len(resumed.notes) == 3
    assert losses(resumed) == losses(whole)
    ours, theirs = compact(whole.model), compact(resumed.model)
    assert all(all(map(torch.equal, ours[n], theirs[n])) for n in ours)

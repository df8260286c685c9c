"""DPO's reference is the model with delta off, never a second model: at every step every loss is
that of the formula written out on plain dense models in fp64, whether the reference is computed or
precomputed, and whether rows are written or not. Where a trained adapter is gone on from, by
`start_adapter` or by TRL's own copy of it ("ref"), the reference is the model that training started
from."""

from __future__ import annotations

import math
import shutil

import pytest
import torch
from adapters import fill_deltas, trained, wrapped
from peft import PeftModel, get_peft_model
from preferences import dpo_loss, updated
from quantised import dense
from tiny_models import batch, tiny_model
from transformers import TrainerCallback
from trl import DPOConfig
from trl_runs import NotingDPOTrainer, arguments, compact, losses, pairs, tokenizer

from trainer_ext import (
    SpftConfig,
    current_selection,
    merge_checkpoint,
    select_neurons,
)
from trainer_ext.tuner.model import deltas

# A log-probability near 5 in fp32, summed over some 30 tokens of four rows, times beta
TOLERANCE = 5 * 2**-23 * 30 * 4 * 0.1


class EvaluatesInTheMiddle(TrainerCallback):
    """On pairs that the trainer has not seen, while rows of the base are written."""

    def on_step_begin(self, args, state, control, **kwargs):
        self.trainer.evaluate(pairs(8).select(range(4, 8)))


def make(folder, model=None, spft_config=None, **more) -> NotingDPOTrainer:
    run = NotingDPOTrainer(
        model or tiny_model(),
        args=arguments(DPOConfig, folder, **more),
        train_dataset=pairs(),
        processing_class=tokenizer,
        spft_config=spft_config,
    )
    callback = EvaluatesInTheMiddle()
    callback.trainer = run
    run.add_callback(callback)
    return run


def assert_losses_are_the_formulas(run, start: dict | None = None, goes_on: bool = True) -> None:
    """
    Args:
        start: deltas of the reference; none of the bare model's.
        goes_on: the run's deltas contain those, else they are beside them.
    """
    assert len(run.notes) == 3 * 3  # of each step two micro-batches and an evaluation
    reference = updated(tiny_model(), start or {})
    # far from a policy that is its own reference, whose loss is log 2
    assert max(abs(note["loss"] - math.log(2)) for note in run.notes) > 1e3 * TOLERANCE
    for note in run.notes:
        policy = updated(tiny_model(), {} if goes_on else start)
        policy = updated(policy, note["deltas"])
        with torch.no_grad():
            expected = dpo_loss(policy, note, reference).item()
        assert abs(note["loss"] - expected) <= TOLERANCE


@pytest.fixture(scope="module")
def sft(tmp_path_factory):
    """Folder of a trained adapter and its deltas."""
    folder = tmp_path_factory.mktemp("sft")
    model = trained()
    model.save_pretrained(folder)
    return folder, compact(model)


def fresh(forward: str, **fields) -> SpftConfig:
    return SpftConfig(**{"r": 4, "calibration_batches": 2, "forward": forward, **fields})


def filled(run) -> NotingDPOTrainer:
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


@pytest.mark.parametrize("precompute", [False, True])
@pytest.mark.parametrize("forward", ["write_through", "delta"])
def test_from_an_sft_adapter_the_reference_is_that_one(tmp_path, sft, forward, precompute):
    folder, start = sft
    config = SpftConfig(start_adapter=str(folder), forward=forward)
    run = make(tmp_path, spft_config=config, precompute_ref_log_probs=precompute)
    run.train()
    assert run.ref_model is None
    assert list(run.model.peft_config) == ["default"]
    chosen = current_selection(run.model).index
    assert all(torch.equal(chosen[name], index) for name, (index, _) in start.items())
    assert_losses_are_the_formulas(run, start, goes_on=False)
    assert {w for note in run.notes for w in note["written"]} == {forward == "write_through"}
    assert run.notes[1]["loss"] == pytest.approx(math.log(2), abs=TOLERANCE)
    first = next(entry for entry in run.state.log_history if "loss" in entry)
    for rewards in ("rewards/chosen", "rewards/rejected"):
        assert first[rewards] == pytest.approx(0, abs=TOLERANCE)
    last = run.state.log_history[-2]
    assert abs(last["rewards/margins"]) > 1e3 * TOLERANCE


def test_from_an_sft_adapter_both_ways_of_trl_train_the_same(tmp_path, sft):
    """One function of the rows W0 + SFT's delta + what is trained, so Adam goes the same way. The
    losses are the formula's to TOLERANCE either way; Adam magnifies roundings where a gradient is
    near zero, so what is trained agrees in norm."""
    folder, start = sft
    by_config = make(tmp_path / "a", spft_config=SpftConfig(start_adapter=str(folder)))
    model = PeftModel.from_pretrained(tiny_model(), folder, is_trainable=True)
    by_copy = make(tmp_path / "b", model)
    for run in (by_config, by_copy):
        run.train()
    assert list(by_copy.model.peft_config) == ["default", "ref"]
    assert losses(by_config) == pytest.approx(losses(by_copy), abs=2 * TOLERANCE)
    theirs = compact(by_copy.model)
    for name, (index, delta) in compact(by_config.model).items():
        assert torch.equal(theirs[name][0], index)
        difference = start[name][1] + delta - theirs[name][1]
        assert difference.norm() <= 1e-4 * delta.norm(), name


def test_from_an_sft_adapter_the_result_needs_that_one_no_more(tmp_path):
    base = tmp_path / "base"
    tiny_model().save_pretrained(base)
    sft = get_peft_model(dense(base), SpftConfig(r=4, importance="random"))
    select_neurons(sft)
    fill_deltas(sft)
    sft.save_pretrained(tmp_path / "sft")
    run = make(tmp_path / "run", dense(base), SpftConfig(start_adapter=str(tmp_path / "sft")))
    run.train()
    run.save_model()
    logits = run.model.eval()(**batch()).logits
    shutil.rmtree(tmp_path / "sft")
    loaded = PeftModel.from_pretrained(dense(base), tmp_path / "run").eval()
    assert torch.equal(loaded(**batch()).logits, logits)
    merged = dense(merge_checkpoint(tmp_path / "run", tmp_path / "merged"))
    expected = dense(base)
    for name, delta in deltas(loaded).items():
        rows = expected.get_submodule(name).weight.data
        rows[delta.index] = delta.anchor + delta.weight.data
    ours = merged.state_dict()
    assert all(torch.equal(ours[name], tensor) for name, tensor in expected.state_dict().items())


@pytest.mark.parametrize("way", ["spft_config", "continued", "start_adapter"])
def test_resuming_is_bit_identical(tmp_path, sft, way):
    def run(folder, resume=False):
        options = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 3}
        if way == "continued":
            made = make(tmp_path / folder, trained(), **options)
        else:
            start = {"start_adapter": str(sft[0])} if way == "start_adapter" else {"r": 4}
            config = SpftConfig(calibration_batches=2, **start)
            made = make(tmp_path / folder, spft_config=config, **options)
        made.train(resume_from_checkpoint=resume)
        return made

    whole = run("a")
    resumed = run("a", resume=str(tmp_path / "a" / "checkpoint-2"))
    assert len(resumed.notes) == 3
    assert losses(resumed) == losses(whole)
    ours, theirs = compact(whole.model), compact(resumed.model)
    assert all(all(map(torch.equal, ours[n], theirs[n])) for n in ours)

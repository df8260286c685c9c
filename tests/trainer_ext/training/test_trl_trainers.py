"""SpftSFTTrainer and SpftDPOTrainer are TRL's own trainers with an SPFT model: losses are the same
bits. Calibration is on their own loss: under DPO, scores are those of autograd through the
policy with the reference's log-probabilities as constants. Plain SFTTrainer and DPOTrainer with
`peft_config` and the callback do the same."""

from __future__ import annotations

import oracles
import pytest
import torch
from adapters import wrapped
from calibrations import assert_close_to_oracle
from preferences import dpo_loss
from tiny_models import tiny_model
from transformers import Trainer, TrainerCallback, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from trl_runs import arguments, completions, losses, pairs, tokenizer

from trainer_ext import (
    ImportanceScores,
    SelectedNeuronAdamW,
    SpftCallback,
    SpftConfig,
    SpftDPOTrainer,
    SpftSFTTrainer,
    SpftTrainerMixin,
    current_selection,
    select_by_scores,
    trained_parameters,
    write_through,
)
from trainer_ext.importance.noise import chunk_rows, weight_noise
from trainer_ext.training.callback import IMPORTANCE_FILE

FIELDS = {"r": 4, "calibration_batches": 2}
# ours, TRL's, the arguments' class, data
KINDS = {
    "sft": (SpftSFTTrainer, SFTTrainer, SFTConfig, completions),
    "dpo": (SpftDPOTrainer, DPOTrainer, DPOConfig, pairs),
}


def make(kind: type, config: type, data, folder, model=None, **more):
    return kind(
        tiny_model() if model is None else model,
        args=arguments(config, folder, max_steps=4),
        train_dataset=data(),
        processing_class=tokenizer,
        **more,
    )


@pytest.mark.parametrize("way", ["peft_config", "wrapped"])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_trls_own_to_the_bit(tmp_path, kind, way):
    """TRL's gets what the callback brings along in ours: the neurons, selected by the same scores,
    in rows that are written from the start, and the optimizer. All else is each trainer's own."""
    ours, trls, config, data = KINDS[kind]
    run = make(ours, config, data, tmp_path, spft_config=SpftConfig(**FIELDS))
    run.train()
    scores = ImportanceScores.load(tmp_path / IMPORTANCE_FILE)

    if way == "wrapped":
        model = wrapped(importance="group_taylor", **FIELDS)
        select_by_scores(model, scores)
        twin = make(trls, config, data, tmp_path / "twin", model)
    else:
        twin = make(trls, config, data, tmp_path / "twin", peft_config=SpftConfig(**FIELDS))
        select_by_scores(twin.model, scores)
    write_through(twin.model)
    twin.optimizer = SelectedNeuronAdamW(trained_parameters(twin.model), lr=1e-2, weight_decay=0.0)
    twin.train()
    assert losses(run) == losses(twin)


@pytest.mark.parametrize("kind", KINDS)
def test_plain_trainers_with_the_callback_do_the_same(tmp_path, kind):
    ours, trls, config, data = KINDS[kind]
    run = make(ours, config, data, tmp_path / "a", spft_config=SpftConfig(**FIELDS))
    plain = make(trls, config, data, tmp_path / "b", peft_config=SpftConfig(**FIELDS))
    plain.add_callback(SpftCallback(plain))
    for trainer in (run, plain):
        trainer.train()
    assert losses(run) == losses(plain)
    chosen, theirs = (current_selection(t.model).index for t in (run, plain))
    assert all(torch.equal(theirs[name], index) for name, index in chosen.items())


def policy_loss(model, micro_batches: list[dict]) -> torch.Tensor:
    """DPO's loss of one optimizer step; nothing flows through the reference."""
    reference = tiny_model().double()
    return sum(dpo_loss(model, batch, reference) for batch in micro_batches) / len(micro_batches)


def calibrated(folder, checkpointing: bool = True, **fields):
    """Scores of a DPO run and the micro-batches of its first steps, which they come from."""

    class Noting(SpftDPOTrainer):
        seen: list[dict] = []  # in the class: calibration puts back what the trainer holds

        def training_step(self, model, inputs, *args, **kwargs):
            self.seen.append(dict(inputs))
            return super().training_step(model, inputs, *args, **kwargs)

    run = Noting(
        tiny_model(),
        args=arguments(DPOConfig, folder, gradient_checkpointing=checkpointing),
        train_dataset=pairs(),
        processing_class=tokenizer,
        spft_config=SpftConfig(**{**FIELDS, **fields}),
    )
    run.train()
    return ImportanceScores.load(folder / IMPORTANCE_FILE).scores, [run.seen[0:2], run.seen[2:4]]


@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("metric", ["group_taylor", "taylor"])
def test_dpos_scores_are_the_policys_alone(tmp_path, metric, checkpointing):
    """By autograd in fp64, over the micro-batches that the first steps are trained on."""
    scores, steps = calibrated(tmp_path, checkpointing, importance=metric)
    expected = getattr(oracles, metric)(tiny_model().double(), steps, policy_loss)
    assert_close_to_oracle(scores, expected)


def test_wanda_counts_the_policys_inputs_alone(tmp_path):
    scores, steps = calibrated(tmp_path, importance="wanda")
    keys = ("input_ids", "attention_mask")
    batches = [{key: batch[key] for key in keys} for step in steps for batch in step]
    assert_close_to_oracle(scores, oracles.wanda(tiny_model(), batches))


def test_zo_taylor_moves_the_policy_alone(tmp_path):
    """One direction: scores are |c| sum_j |w_ij z_ij|, c by moving all weights of a dense policy.

    Were the reference moved too, c would vanish. fp32 losses leave c some units u of rounding,
    k u / (2 eps); k = 32 as for zo_taylor itself."""
    eps = 1e-3
    fields = {"importance": "zo_taylor", "zo_directions": 1, "zo_eps": eps}
    scores, steps = calibrated(tmp_path, calibration_batches=1, **fields)
    losses, moved = [], {}
    for sign in (1, -1):
        policy = tiny_model().double()
        for name in scores:
            weight = policy.get_submodule(name).weight.data
            chunks = range(-(-len(weight) // chunk_rows(weight.shape[1])))
            noises = [weight_noise((42, 0, 0, name), chunk, *weight.shape) for chunk in chunks]
            noise = torch.cat(noises).double()
            moved[name] = (weight * noise).abs().sum(dim=1)
            weight += sign * eps * noise
        losses.append(policy_loss(policy, steps[0]).item())
    c = abs(losses[0] - losses[1]) / (2 * eps)
    tolerance = 32 * 2**-24 / (2 * eps)
    assert c > 10 * tolerance
    for name, layer_scores in scores.items():
        assert ((layer_scores - c * moved[name]).abs() <= tolerance * moved[name]).all(), name


class NoGradients(TrainerCallback):
    """What calibration must leave when training begins, added after SpftCallback."""

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        assert all(p.grad is None for p in model.parameters())
        trained = {n for n, p in model.named_parameters() if p.requires_grad}
        assert any("modules_to_save" in name for name in trained)
        self.looked = True


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_references_switching_leaves_no_gradients(tmp_path, reentrant):
    """Between a policy's forward and its backward PEFT lets modules_to_save be trained again."""
    settings = {"gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    run = SpftDPOTrainer(
        tiny_model("llama_bias"),
        args=arguments(DPOConfig, tmp_path, max_steps=2, **settings),
        train_dataset=pairs(),
        processing_class=tokenizer,
        spft_config=SpftConfig(modules_to_save=["lm_head", "input_layernorm"], **FIELDS),
    )
    look = NoGradients()
    run.add_callback(look)
    run.train()
    assert look.looked


def test_a_given_adapter_stays_where_the_trainer_has_moved_it(tmp_path):
    """As to a GPU: the mixin undoes a rounding, nothing else."""

    class Moving(Trainer):
        def __init__(self, model, *args, **kw):
            super().__init__(model, *args, **kw)
            self.moved = {}
            for name, parameter in model.named_parameters():
                parameter.data = parameter.data.clone()
                self.moved[name] = parameter.data_ptr()

    class SpftMoving(SpftTrainerMixin, Moving):
        pass

    trainer = SpftMoving(wrapped(), TrainingArguments(tmp_path, use_cpu=True, report_to=[]))
    parameters = trainer.model.named_parameters()
    assert {name: p.data_ptr() for name, p in parameters} == trainer.moved

"""The mixin makes every kind of TRL trainer an SPFT trainer: KTO, ORPO, CPO, reward modelling, GRPO
and RLOO calibrate on their own loss, move the selected neurons only, leave the base as it was, and
train on the very batches, GRPO's first samples included, that they would have seen without
calibration."""

from __future__ import annotations

import copy

import pytest
import torch
from oracles import weights
from safetensors.torch import load_file
from tiny_models import CONFIGS, tiny_model
from transformers import LlamaForSequenceClassification
from trl import (
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RewardConfig,
    RewardTrainer,
    RLOOConfig,
    RLOOTrainer,
)
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer
from trl_runs import arguments, completions, pairs, tokenizer

from trainer_ext import ImportanceScores, SpftConfig, SpftTrainerMixin, current_selection
from trainer_ext.training.callback import IMPORTANCE_FILE
from trainer_ext.tuner.model import deltas


def length_reward(completions, **kwargs):
    return [float(len(set(text))) for text in completions]


SAMPLED = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1}
SAMPLED_MORE = {"reward_funcs": length_reward}
# trainer, its arguments' class, further arguments, further trainer arguments, data
KINDS = {
    "kto": (KTOTrainer, KTOConfig, {}, {}, completions),
    "orpo": (ORPOTrainer, ORPOConfig, {"max_length": 64}, {}, pairs),
    "cpo": (CPOTrainer, CPOConfig, {"max_length": 64}, {}, pairs),
    "reward": (RewardTrainer, RewardConfig, {}, {}, pairs),
    "grpo": (GRPOTrainer, GRPOConfig, SAMPLED, SAMPLED_MORE, completions),
    "rloo": (RLOOTrainer, RLOOConfig, SAMPLED, SAMPLED_MORE, completions),
}

# cpo and rloo differ from orpo and grpo in their losses only
TESTED = [pytest.param(k, marks=pytest.mark.full) if k in ("cpo", "rloo") else k for k in KINDS]
SAMPLED_KINDS = ("grpo", "rloo")


def base_model(kind: str):
    if kind != "reward":
        return tiny_model()
    torch.manual_seed(0)
    return LlamaForSequenceClassification(
        copy.deepcopy(CONFIGS["llama"]).__class__(
            **{**CONFIGS["llama"].to_diff_dict(), "num_labels": 1}
        )
    )


def is_rounded(value) -> bool:
    """Log-probabilities, which depend on the path of the forward in the last bits."""
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def make(kind: str, folder, **fields):
    base, config, settings, more, data = KINDS[kind]

    class Recording(SpftTrainerMixin, base):
        """Keeps what its loss was given; not in itself, where calibration would put it back."""

        inputs: list[str] = []

        def compute_loss(self, model, inputs, *args, **kwargs):
            self.inputs.append(str({k: v for k, v in inputs.items() if not is_rounded(v)}))
            return super().compute_loss(model, inputs, *args, **kwargs)

    return Recording(
        base_model(kind),
        args=arguments(config, folder, max_steps=2, **settings),
        train_dataset=data(),
        processing_class=tokenizer,
        spft_config=SpftConfig(**{"r": 4, "calibration_batches": 2, **fields}),
        **more,
    )


@pytest.mark.parametrize("kind", TESTED)
def test_calibrates_trains_and_saves(tmp_path, kind):
    run = make(kind, tmp_path)
    run.train()
    run.save_model()
    scores = ImportanceScores.load(tmp_path / IMPORTANCE_FILE)
    assert scores.batches == 2
    assert all(bool(s.max() > 0) for s in scores.scores.values())
    chosen = current_selection(run.model).index
    assert all(bool(d.weight.abs().sum() > 0) for d in deltas(run.model).values())
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert sum(name.endswith("spft_delta.weight") for name in saved) == len(chosen) == 14
    after, before = weights(run.model.unload()), weights(base_model(kind))
    assert all(torch.equal(after[name], before[name]) for name in before.keys() - {"score"})
    # the first calibration batch is all micro-batches of the first step: of GRPO, the same samples
    calibrated, trained = run.inputs[:4], run.inputs[-4:]
    assert calibrated[:2] == trained[:2]
    assert len(set(calibrated)) == 4
    if kind not in SAMPLED_KINDS:
        assert calibrated == trained


@pytest.mark.parametrize("kind", TESTED)
def test_training_sees_what_it_sees_without_calibration(tmp_path, kind):
    calibrated = make(kind, tmp_path / "a")
    calibrated.train()
    plain = make(kind, tmp_path / "b", importance="random")  # which sets the seed
    plain.train()
    seen = 2 if kind in SAMPLED_KINDS else 4  # samples are those of the neurons trained so far
    assert len(plain.inputs) == 4
    assert calibrated.inputs[-4:][:seen] == plain.inputs[:seen]

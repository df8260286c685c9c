"""`prepare_trainer` is all that changes a trainer: its class gets SPFT's methods before its own. It
then trains what SpftTrainer trains, bit for bit. The callback by hand does the same and warns."""

from __future__ import annotations

import json

import pytest
import torch
from adapters import wrapped
from tiny_models import dataset, tiny_model
from training_arguments import arguments
from transformers import Trainer

from trainer_ext import SpftCallback, SpftConfig, SpftTrainer, prepare_trainer
from trainer_ext.training.methods import TrainerMethods
from trainer_ext.tuner.model import deltas

FIELDS = {"r": 4, "importance": "group_taylor", "calibration_batches": 2}


class Noting(Trainer):
    """A trainer of somebody's own, which overrides what SPFT adds to."""

    saved = 0

    def _save_checkpoint(self, *args, **kwargs):
        self.saved += 1
        return super()._save_checkpoint(*args, **kwargs)


def foreign(folder, **more) -> Noting:
    model = wrapped(**FIELDS)
    return Noting(model, arguments(folder, **more), train_dataset=dataset())


def test_it_trains_what_the_spft_trainer_trains(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2}
    ours = SpftTrainer(
        tiny_model(),
        arguments(tmp_path / "a", **options),
        train_dataset=dataset(),
        spft_config=SpftConfig(task_type="CAUSAL_LM", **FIELDS),
    )
    run = foreign(tmp_path / "b", **options)
    callback = prepare_trainer(run)
    assert isinstance(run, TrainerMethods)
    assert isinstance(run, Noting)
    assert type(run).__name__ == "Noting"
    for trainer in (ours, run):
        trainer.train()
    assert callback.scores.metric == "group_taylor"
    assert run.saved == 2  # its own method was called, around which ours stands
    assert (tmp_path / "b" / "checkpoint-2" / "spft_checkpoint.json").is_file()
    for name, delta in deltas(ours.model).items():
        assert torch.equal(delta.weight, deltas(run.model)[name].weight), name


def test_other_trainers_of_the_class_stay_what_they_are(tmp_path):
    run, other = foreign(tmp_path / "a"), foreign(tmp_path / "b")
    prepare_trainer(run)
    assert type(other) is Noting
    assert not isinstance(other, TrainerMethods)


def test_the_callback_by_hand_does_the_same_and_warns(tmp_path):
    run, old = foreign(tmp_path / "a"), foreign(tmp_path / "b")
    prepare_trainer(run)
    with pytest.warns(FutureWarning, match="prepare_trainer"):
        old.add_callback(SpftCallback(old))
    for trainer in (run, old):
        trainer.train()
    for name, delta in deltas(run.model).items():
        assert torch.equal(delta.weight, deltas(old.model)[name].weight), name


def test_a_trainer_is_prepared_once(tmp_path):
    run = foreign(tmp_path)
    callback = prepare_trainer(run)
    assert prepare_trainer(run) is callback
    run.train()
    assert json.loads((tmp_path / "spft_report.json").read_text())["calibration"] is not None


def test_methods_that_others_put_into_the_trainer_itself_are_called_within_ours(tmp_path):
    run, saved = foreign(tmp_path, save_strategy="steps", save_steps=2), []
    own = run._save_checkpoint
    run._save_checkpoint = lambda *args, **kwargs: saved.append(own(*args, **kwargs))
    prepare_trainer(run)
    run.train()
    assert len(saved) == 2
    assert (tmp_path / "checkpoint-4" / "spft_checkpoint.json").is_file()

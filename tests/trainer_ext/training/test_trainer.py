"""A run by SpftTrainer: calibration leaves no trace in the trainer, training sees exactly the
batches that it sees without calibration, only selected neurons move, an interrupted run resumed
is bit-identical to the undisturbed one, and the report beside the adapter tells what happened."""

from __future__ import annotations

import copy
import json
import random

import numpy as np
import pytest
import torch
from adapters import selected, wrapped
from oracles import weights
from tiny_models import dataset, tiny_model
from torch.utils.data import IterableDataset
from training_arguments import arguments
from transformers import Trainer, TrainerCallback

from trainer_ext import (
    ImportanceScores,
    NeuronSelection,
    SpftCallback,
    SpftConfig,
    SpftError,
    SpftTrainer,
    current_selection,
)
from trainer_ext.training.callback import IMPORTANCE_FILE, SELECTION_FILE
from trainer_ext.tuner.model import deltas


class Recording(SpftTrainer):
    """Keeps what its training steps were given; counts tokens in its loss, as TRL's trainers do."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.seen: list[torch.Tensor] = []
        self._metrics = {"train": {"tokens": []}}

    def training_step(self, model, inputs, *args, **kwargs):
        self.seen.append(inputs["input_ids"].clone())
        return super().training_step(model, inputs, *args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        self._metrics["train"]["tokens"].append(inputs["input_ids"].numel())
        torch.rand(3), random.random(), np.random.rand()  # losses may be random
        return super().compute_loss(model, inputs, *args, **kwargs)


def trainer(folder, kind=Recording, config=None, data=None, callbacks=(), **more):
    return kind(
        tiny_model(),
        arguments(folder, **more),
        train_dataset=dataset() if data is None else data,
        spft_config=config or SpftConfig(r=4, calibration_batches=3),
        callbacks=list(callbacks),
    )


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_training_sees_the_same_batches_with_and_without_calibration(
    tmp_path, workers, accumulation
):
    options = {"dataloader_num_workers": workers, "gradient_accumulation_steps": accumulation}
    runs = []
    for importance in ("magnitude", "group_taylor"):
        config = SpftConfig(r=4, importance=importance, calibration_batches=3)
        run = trainer(tmp_path, config=config, **options)
        run.train()
        runs.append(run.seen)
    assert len(runs[0]) == 4 * accumulation
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_calibration_uses_the_first_batches_and_the_trainers_loss_scale(tmp_path):
    """Scores are those of the mean gradient over the first optimizer steps' whole batches."""
    from oracles import group_taylor

    run = trainer(tmp_path, gradient_accumulation_steps=2)
    run.train()
    steps = [torch.cat(run.seen[i : i + 2]) for i in (0, 2, 4)]
    expected = group_taylor(tiny_model(), [{"input_ids": s, "labels": s} for s in steps])
    for name, scores in ImportanceScores.load(tmp_path / IMPORTANCE_FILE).scores.items():
        assert (scores - expected[name]).abs().max() <= 1e-5 * expected[name].max()


class Snapshot(TrainerCallback):
    """What a trainer holds when training begins; put before or after SpftCallback."""

    def __init__(self):
        self.state = None
        self.trainer = None

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        run = self.trainer
        gradient_state = run.accelerator.gradient_state
        self.state = {
            "modes": [m.training for m in model.modules()],
            "flags": [p.requires_grad for p in model.parameters()],
            "gradients": [p.grad for p in model.parameters()],
            "weights": [p.detach().clone() for p in model.parameters()],
            "optimizer": copy.deepcopy(run.optimizer.state_dict()),
            "metrics": copy.deepcopy(run._metrics),
            "trainer_state": copy.deepcopy(vars(run.state)),
            "loaders": list(map(id, run.accelerator._dataloaders)),
            "references": list(map(id, gradient_state.dataloader_references)),
            "sync": gradient_state.sync_gradients,
            "random": random.getstate(),
            "numpy": np.random.get_state()[1].tolist(),
            "torch": torch.get_rng_state().tolist(),
            "attributes": sorted(vars(run)),
        }


def test_calibration_leaves_no_trace(tmp_path):
    before, after = Snapshot(), Snapshot()
    run = trainer(tmp_path, weight_decay=0.1, neftune_noise_alpha=5.0)
    before.trainer = after.trainer = run
    run.callback_handler.callbacks.insert(0, before)
    run.add_callback(after)
    run.train()
    for key, value in before.state.items():
        if key in ("weights", "trainer_state"):
            continue
        assert after.state[key] == value, key
    assert all(map(torch.equal, before.state["weights"], after.state["weights"]))
    ours, theirs = before.state["trainer_state"], after.state["trainer_state"]
    assert {k: v for k, v in ours.items() if k != "stateful_callbacks"} == {
        k: v for k, v in theirs.items() if k != "stateful_callbacks"
    }


def test_scores_do_not_depend_on_dropout(tmp_path):
    from transformers import AutoModelForCausalLM

    scores = []
    for rate in (0.0, 0.5):
        model = tiny_model("gpt2")
        configuration = copy.deepcopy(model.config)
        for name in ("resid_pdrop", "embd_pdrop", "attn_pdrop"):
            setattr(configuration, name, rate)
        twin = AutoModelForCausalLM.from_config(configuration)
        twin.load_state_dict(model.state_dict())
        run = SpftTrainer(
            twin,
            arguments(tmp_path / str(rate), max_steps=1),
            train_dataset=dataset(),
            spft_config=SpftConfig(r=4, calibration_batches=2),
        )
        run.train()
        scores.append(ImportanceScores.load(tmp_path / str(rate) / IMPORTANCE_FILE).scores)
    assert all(torch.equal(scores[0][name], scores[1][name]) for name in scores[0])


def test_only_selected_neurons_move_and_the_files_agree(tmp_path):
    run = trainer(tmp_path)
    run.train()
    index = current_selection(run.model).index
    saved = NeuronSelection.load(tmp_path / SELECTION_FILE)
    scores = ImportanceScores.load(tmp_path / IMPORTANCE_FILE)
    assert all(bool(d.weight.abs().sum() > 0) for d in deltas(run.model).values())
    merged, base = weights(run.model.merge_and_unload()), weights(tiny_model())
    for name, rows in index.items():
        moved = (merged[name] != base[name]).any(dim=1).nonzero().flatten()
        assert set(moved.tolist()) <= set(rows.tolist())
        assert torch.equal(saved.index[name], rows)
        best = scores.scores[name].topk(4).indices.sort().values
        assert torch.equal(best, rows)


def test_training_from_an_importance_file_is_bit_identical(tmp_path):
    first = trainer(tmp_path / "a")
    first.train()
    config = SpftConfig(r=4, importance_file=str(tmp_path / "a" / IMPORTANCE_FILE))
    second = trainer(tmp_path / "b", config=config)
    second.train()
    ours, theirs = deltas(first.model), deltas(second.model)
    assert all(torch.equal(theirs[n].weight, d.weight) for n, d in ours.items())
    assert all(torch.equal(theirs[n].index, d.index) for n, d in ours.items())


class Interrupt(TrainerCallback):
    """Stops the process's work as an exception does, after a checkpoint."""

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == 3:
            raise KeyboardInterrupt


@pytest.mark.parametrize("checkpointing", [False, True])
def test_resuming_is_bit_identical(tmp_path, checkpointing):
    options = {
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 2,
        "gradient_checkpointing": checkpointing,
        "weight_decay": 0.1,
    }
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    stopped = trainer(tmp_path / "stopped", callbacks=[Interrupt()], **options)
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    resumed = trainer(tmp_path / "stopped", **options)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 6
    assert len(resumed.seen) == 4  # steps 3 to 6, from the checkpoint of step 2
    ours, theirs = deltas(whole.model), deltas(resumed.model)
    for name, delta in ours.items():
        assert torch.equal(theirs[name].index, delta.index)
        assert torch.equal(theirs[name].weight, delta.weight)
    for a, b in zip(
        whole.optimizer.state_dict()["state"].values(),
        resumed.optimizer.state_dict()["state"].values(),
        strict=True,
    ):
        assert a.keys() == b.keys()
        assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_loaded_adapter_keeps_its_neurons(tmp_path):
    model = selected(seed=3)
    before = current_selection(model).index
    run = SpftTrainer(model, arguments(tmp_path), train_dataset=dataset())
    run.train()
    after = current_selection(run.model).index
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert not (tmp_path / IMPORTANCE_FILE).exists()


def test_a_plain_trainer_with_the_callback_does_the_same(tmp_path):
    ours = trainer(tmp_path / "a")
    ours.train()
    model = wrapped(r=4, importance="group_taylor", calibration_batches=3)
    plain = Trainer(model, arguments(tmp_path / "b"), train_dataset=dataset())
    plain.add_callback(SpftCallback(plain))
    plain.train()
    theirs = deltas(plain.model)
    for name, delta in deltas(ours.model).items():
        assert torch.equal(theirs[name].weight, delta.weight)


class Restarting(IterableDataset):
    def __init__(self, rows):
        self.rows = rows

    def __iter__(self):
        return iter(self.rows)


class OneShot(IterableDataset):
    def __init__(self, rows):
        self.stream = iter(rows)

    def __iter__(self):
        yield from self.stream


def test_a_restarting_stream_is_calibrated_on_and_trained_from_its_start(tmp_path):
    rows = dataset(32)
    run = trainer(tmp_path, data=Restarting(rows))
    run.train()
    assert [int(t[0, 0]) for t in run.seen] == [0, 4, 8, 12]


def test_a_one_shot_stream_is_refused_unless_scores_are_given(tmp_path):
    with pytest.raises(SpftError, match="does not start over"):
        trainer(tmp_path, data=OneShot(dataset(32))).train()
    trainer(tmp_path / "scores").train()
    config = SpftConfig(r=4, importance_file=str(tmp_path / "scores" / IMPORTANCE_FILE))
    run = trainer(tmp_path, config=config, data=OneShot(dataset(32)))
    run.train()
    assert [int(t[0, 0]) for t in run.seen] == [0, 4, 8, 12]


def test_a_small_dataset_gives_fewer_batches_and_a_warning(tmp_path, caplog):
    config = SpftConfig(r=4, calibration_batches=50)
    trainer(tmp_path, config=config).train()
    assert ImportanceScores.load(tmp_path / IMPORTANCE_FILE).batches == 8  # 32 rows by 4
    assert "calibrated on 8 batches" in caplog.text


def test_a_compiled_model_is_calibrated_and_trained(tmp_path):
    compiled = trainer(tmp_path / "a", torch_compile=True, torch_compile_backend="aot_eager")
    compiled.train()
    eager = trainer(tmp_path / "b")
    eager.train()
    theirs = deltas(compiled.model)
    for name, delta in deltas(eager.model).items():
        assert torch.equal(theirs[name].index, delta.index)
        torch.testing.assert_close(theirs[name].weight, delta.weight, rtol=1e-3, atol=1e-5)


def test_scores_of_another_run_do_not_stop_a_resumed_one(tmp_path, caplog):
    options = {"save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, **options).train()
    (tmp_path / IMPORTANCE_FILE).write_text("damaged")
    trainer(tmp_path, **{**options, "max_steps": 6}).train(resume_from_checkpoint=True)
    assert "will lack the importance scores" in caplog.text


def test_classification_heads_are_trained_and_reported(tmp_path):
    """PEFT adds the head to modules_to_save by itself, as a set."""
    from transformers import LlamaForSequenceClassification

    rows = [{"input_ids": row["input_ids"], "labels": i % 2} for i, row in enumerate(dataset())]
    model = LlamaForSequenceClassification(copy.deepcopy(tiny_model().config))
    run = SpftTrainer(model, arguments(tmp_path), train_dataset=rows, spft_config=SpftConfig(r=4))
    run.train()
    assert (tmp_path / "spft_report.json").is_file()
    trainable = {n for n, p in run.model.named_parameters() if p.requires_grad}
    assert any(".score.modules_to_save." in name for name in trainable)
    assert sum("spft_delta" in name for name in trainable) == 14


def test_the_users_own_lists_and_generators_are_left_alone(tmp_path):
    """A dataset that is a list is not bookkeeping; a sampler may have a generator of its own."""

    class OwnGenerator(Recording):
        def _get_train_sampler(self, train_dataset=None):
            generator = torch.Generator().manual_seed(7)
            return torch.utils.data.RandomSampler(self.train_dataset, generator=generator)

    runs = []
    for importance in ("magnitude", "group_taylor"):
        data = dataset()
        rows = list(map(id, data))
        run = trainer(
            tmp_path,
            kind=OwnGenerator,
            data=data,
            config=SpftConfig(r=4, importance=importance, calibration_batches=3),
            accelerator_config={"use_seedable_sampler": False},
        )
        run.train()
        assert list(map(id, run.train_dataset)) == rows
        runs.append(run.seen)
    assert all(map(torch.equal, *runs))


def test_an_attribute_that_becomes_plain_during_calibration_stays(tmp_path):
    class Emptying(SpftTrainer):
        buffer = None

        def compute_loss(self, *args, **kwargs):
            self.buffer.clear()
            return super().compute_loss(*args, **kwargs)

    run = trainer(tmp_path, kind=Emptying)
    run.buffer = {"k": object()}
    run.train()
    assert run.buffer == {}


def test_train_twice_in_one_process_keeps_the_first_selection_and_its_scores(tmp_path):
    run = trainer(tmp_path)
    run.train()
    first = current_selection(run.model).index
    run.train()
    report = json.loads((tmp_path / "spft_report.json").read_text())
    assert report["calibration"]["batches"] == 3
    second = current_selection(run.model).index
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_evaluation_before_training_is_the_base_models(tmp_path):
    run = trainer(tmp_path)
    base = Trainer(tiny_model(), arguments(tmp_path), eval_dataset=dataset())
    ours = run.evaluate(dataset())["eval_loss"]
    assert ours == base.evaluate()["eval_loss"]


def test_custom_loss_functions_are_calibrated_with(tmp_path):
    """A loss of twice the size gives twice the scores: the trainer's own loss is what counts."""
    scores = []
    for factor in (1.0, 2.0):

        class Scaled(SpftTrainer):
            def compute_loss(self, model, inputs, *args, factor=factor, **kwargs):
                return factor * super().compute_loss(model, inputs, *args, **kwargs)

        trainer(tmp_path / str(factor), kind=Scaled).train()
        scores.append(ImportanceScores.load(tmp_path / str(factor) / IMPORTANCE_FILE).scores)
    for name in scores[0]:
        torch.testing.assert_close(scores[1][name], 2 * scores[0][name], rtol=1e-6, atol=0)

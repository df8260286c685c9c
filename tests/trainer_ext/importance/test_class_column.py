"""Class ids go from a dataset column to the calibration, and never into the model.

Invariants: the id that arrives with a row is the position of that row's own value among the sorted
values; the model's batches are those of a run without classes, in training and in evaluation; rows
of the user's own are left as they are; every mistake takes one line.
"""

from __future__ import annotations

import pickle

import datasets
import pytest
import torch
from adapters import selected, wrapped
from oracles import quantile_mean
from tiny_models import batch, dataset, tiny_model
from torch.utils.data import IterableDataset
from transformers import (
    DataCollatorWithFlattening,
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
    default_data_collator,
)

from trainer_ext import SpftCallback, SpftConfig, SpftError, SpftTrainer, select_neurons
from trainer_ext.config.registry import METRICS
from trainer_ext.importance.class_column import CLASS_KEY, RowClasses, hide_classes
from trainer_ext.importance.metrics.quantile_mean import QuantileMean
from trainer_ext.ranking.selection import top_neurons

WORDS = ("north", "east", "south")
CONFIG = {"r": 4, "importance": "quantile_mean", "class_field": "side", "calibration_batches": 3}


@pytest.fixture(autouse=True)
def seen(monkeypatch):
    """Classes of every calibration batch, noted by quantile_mean itself."""
    batches = []

    class Noting(QuantileMean):
        def observe(self, run_batch):
            super().observe(run_batch)
            classes = self.row_classes.current
            batches.append(None if classes is None else classes.clone())

    monkeypatch.setitem(METRICS, "quantile_mean", Noting)
    return batches


def watch(model, reached: set[str]) -> None:
    """Note what a PEFT model's own forward is called with."""
    forward = model.forward

    def watched(*args, **kwargs):
        reached.update(kwargs)
        return forward(*args, **kwargs)

    model.forward = watched


class Watched(SpftTrainer):
    """Keeps the inputs of its losses and what the model is called with."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.inputs, self.reached = [], set()
        watch(self.model, self.reached)

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.inputs.append({k: v.clone() for k, v in inputs.items()})
        return super().compute_loss(model, inputs, *args, **kwargs)


def arguments(folder, **more):
    options = {"max_steps": 3, "per_device_train_batch_size": 4, "eval_strategy": "steps"}
    options |= {
        "eval_steps": 1,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        **more,
    }
    return TrainingArguments(str(folder), disable_tqdm=True, **options)


def side_of(row: int) -> str:
    """Rows of `dataset()` have their number as the first token."""
    return WORDS[row * row % 3 - 1]


def labelled(kind: str, value=side_of, rows: int = 32):
    data = [{**row, "side": value(i)} for i, row in enumerate(dataset(rows))]
    if kind == "list":
        return data
    plain = [{k: v.tolist() if torch.is_tensor(v) else v for k, v in row.items()} for row in data]
    made = datasets.Dataset.from_list(plain)
    return made.with_format("torch") if kind == "torch format" else made


def trained(folder, data, evaluation=None, config=None, **more) -> Watched:
    collator = more.pop("data_collator", default_data_collator)
    trainer = Watched(
        more.pop("model", None) or tiny_model(),
        arguments(folder, **more),
        train_dataset=data,
        eval_dataset=dataset(8, seed=1) if evaluation is None else evaluation,
        data_collator=collator,
        spft_config=SpftConfig(**{**CONFIG, **(config or {})}),
    )
    trainer.train()
    return trainer


@pytest.mark.parametrize("kind", ["list", "dataset", "torch format"])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("remove_unused", [True, False])
def test_every_row_comes_with_its_class(tmp_path, seen, kind, workers, remove_unused):
    options = {"dataloader_num_workers": workers, "remove_unused_columns": remove_unused}
    data = labelled(kind)
    trainer = trained(tmp_path, data, **options)
    plain = trained(tmp_path, dataset(), config={"importance": "group_taylor"})

    present = sorted({side_of(i) for i in range(32)})
    training = [b for b in trainer.inputs if CLASS_KEY in b]
    assert len(training) == 3  # what calibration adds to a trainer's lists is taken out again
    for inputs in training:
        numbers = [present.index(side_of(int(row[0]))) for row in inputs["input_ids"]]
        assert inputs[CLASS_KEY].tolist() == numbers
    for classes, inputs in zip(seen, training, strict=True):
        assert torch.equal(classes, inputs[CLASS_KEY])
    assert len(set(torch.cat(seen).tolist())) == 2

    assert "input_ids" in trainer.reached
    assert not trainer.reached & {CLASS_KEY, "side"}
    assert len(trainer.inputs) == len(plain.inputs)
    for mine, other in zip(trainer.inputs, plain.inputs, strict=True):
        for name in other:
            assert torch.equal(mine[name], other[name])
    assert trainer.state.log_history[0]["loss"] == plain.state.log_history[0]["loss"]
    assert data[0]["side"] == side_of(0)  # the collator worked on copies


@pytest.mark.parametrize("loss", ["label smoothing", "own function"])
def test_losses_that_take_inputs_apart(tmp_path, seen, loss):
    options = {"label_smoothing_factor": 0.1} if loss == "label smoothing" else {}
    trainer = Watched(
        tiny_model(),
        arguments(tmp_path, include_num_input_tokens_seen="all", **options),
        train_dataset=labelled("dataset"),
        eval_dataset=labelled("dataset", rows=8),
        compute_loss_func=None if options else lambda out, labels, num_items_in_batch: out.loss,
        spft_config=SpftConfig(**CONFIG),
    )
    if not options:
        trainer.compute_loss_func = lambda outputs, labels, num_items_in_batch: (
            torch.nn.functional.cross_entropy(outputs.logits.flatten(0, 1), labels.flatten())
        )
    trainer.train()
    assert len(seen) == 3
    assert CLASS_KEY not in trainer.reached


@pytest.mark.parametrize("evaluation", ["without the column", "with it", "with other values"])
def test_evaluation_rows(tmp_path, evaluation):
    rows = {
        "without the column": dataset(8, seed=1),
        "with it": labelled("list", rows=8),
        "with other values": labelled("list", value=lambda i: "elsewhere", rows=8),
    }[evaluation]
    trainer = trained(tmp_path, labelled("list"), evaluation=rows)
    assert len([e for e in trainer.state.log_history if "eval_loss" in e]) == 3
    assert CLASS_KEY not in trainer.reached


def test_evaluation_before_training(tmp_path):
    trainer = Watched(
        tiny_model(),
        arguments(tmp_path),
        train_dataset=labelled("list"),
        eval_dataset=labelled("list", rows=8),
        spft_config=SpftConfig(**CONFIG),
    )
    assert trainer.evaluate()["eval_loss"] > 0
    assert CLASS_KEY not in trainer.reached


def test_a_model_that_is_made_when_training_begins(tmp_path, seen):
    reached = set()

    def model_init():
        model = wrapped(**CONFIG)
        watch(model, reached)
        return model

    trainer = Trainer(
        args=arguments(tmp_path, eval_strategy="no"),
        model_init=model_init,
        train_dataset=labelled("list"),
    )
    trainer.add_callback(SpftCallback(trainer))
    trainer.train()
    assert len(seen) == 3
    assert "input_ids" in reached
    assert CLASS_KEY not in reached


@pytest.mark.parametrize(
    ("value", "order"),
    [
        (lambda i: i % 2 == 0, [False, True]),
        (lambda i: (7, -1, 100)[i % 3], [-1, 7, 100]),
        (lambda i: ("b", "a")[i % 2], ["a", "b"]),
        (lambda i: (True, 1, "1")[i % 3], [True, 1, "1"]),  # bool < int < str
    ],
    ids=["bool", "int", "str", "mixed"],
)
def test_ids_are_positions_among_the_sorted_values(tmp_path, value, order):
    trainer = trained(tmp_path, labelled("list", value))
    found = [(type(v), v) for v in order]
    for inputs in trainer.inputs:
        for row, number in zip(inputs["input_ids"], inputs.get(CLASS_KEY, ()), strict=False):
            wanted = value(int(row[0]))
            assert found[int(number)] == (type(wanted), wanted)


def test_a_classifiers_own_labels_can_be_the_classes(tmp_path, seen):
    torch.manual_seed(0)
    config = tiny_model().config
    config.num_labels = 3
    rows = [{"input_ids": r["input_ids"], "label": i % 3} for i, r in enumerate(dataset())]
    fields = {"class_field": "label", "exclude_modules": ["score"], "task_type": "SEQ_CLS"}
    model = LlamaForSequenceClassification(config)
    trainer = trained(tmp_path, rows, rows[:8], fields, model=model)
    for inputs in trainer.inputs:
        assert torch.equal(inputs[CLASS_KEY], inputs["labels"])
    assert len(seen) == 3


def test_resuming_is_bit_exact(tmp_path):
    """The resumed run meets its batches with the column in place, but does not calibrate."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    whole = trained(tmp_path / "whole", labelled("dataset"), **options)
    resumed = Watched(
        tiny_model(),
        arguments(tmp_path / "whole", **options),
        train_dataset=labelled("dataset"),
        eval_dataset=dataset(8, seed=1),
        data_collator=default_data_collator,
        spft_config=SpftConfig(**CONFIG),
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    for (name, a), b in zip(
        whole.model.named_parameters(), resumed.model.parameters(), strict=True
    ):
        assert torch.equal(a, b), name


def test_resuming_needs_no_classes(tmp_path):
    """Its neurons are selected; a mistake in the column ends only a run that selects."""
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    trained(tmp_path / "whole", labelled("dataset"), **options)
    bare = dataset()
    for resume in (True, False):
        run = SpftTrainer(
            tiny_model(),
            arguments(tmp_path / ("whole" if resume else "new"), **options),
            train_dataset=bare,
            data_collator=default_data_collator,
            spft_config=SpftConfig(**CONFIG),
            eval_dataset=bare[:4],
        )
        if resume:
            run.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
            assert run.state.global_step == 4
        else:
            with pytest.raises(SpftError, match="has no such column"):
                run.train()


def test_collator_is_wrapped_once_and_can_be_pickled(tmp_path):
    trainer = trained(tmp_path, labelled("list"))
    collator = trainer.data_collator
    SpftCallback(trainer)
    assert trainer.data_collator is collator
    copy = pickle.loads(pickle.dumps(collator))
    rows = labelled("list", rows=4)
    assert torch.equal(copy(rows)[CLASS_KEY], collator(rows)[CLASS_KEY])


def test_loops_of_the_users_own(seen):
    batches = [{**batch(seed), CLASS_KEY: torch.tensor([0, 1, seed])} for seed in range(3)]
    model = wrapped(**{k: v for k, v in CONFIG.items() if k != "calibration_batches"})
    selection = select_neurons(model, batches)
    assert [classes.tolist() for classes in seen] == [[0, 1, 0], [0, 1, 1], [0, 1, 2]]
    assert all(CLASS_KEY in b for b in batches)
    model(**batches[0]).loss.backward()  # and training may go on with the same batches

    bare = [{k: v for k, v in b.items() if k != CLASS_KEY} for b in batches]
    expected = quantile_mean(tiny_model(), bare, [b[CLASS_KEY].tolist() for b in batches])
    for name, index in selection.index.items():
        assert torch.equal(index, top_neurons(expected[name], 4))


def test_hooks_come_and_go():
    model = selected()
    hide_classes(model)
    hide_classes(model)
    assert len(model._forward_pre_hooks) == 1
    with RowClasses.installed(model) as classes:
        model(**batch(), **{CLASS_KEY: torch.tensor([4, 5, 6])})
        assert classes.current.tolist() == [4, 5, 6]
        model(**batch())
        assert classes.current is None
    assert len(model._forward_pre_hooks) == 1


class Stream(IterableDataset):
    def __iter__(self):
        return iter(labelled("list"))


ROWS = [
    (dataset, {}, ["class_field is 'side'", "input_ids, labels", "name the one"]),
    (lambda: labelled("dataset"), {"class_field": "sdie"}, ["'sdie'", "input_ids, labels, side"]),
    (lambda: labelled("list", lambda i: "one"), {}, ["single-valued ('one')", "two classes"]),
    (lambda: labelled("dataset", lambda i: 7), {}, ["single-valued (7)", "two classes"]),
    (lambda: labelled("dataset", lambda i: "a" if i else None), {}, ["no value", "every row"]),
    (lambda: labelled("list", lambda i: i / 2), {}, ["a float (0.0)", "strings, whole numbers"]),
    (lambda: labelled("list", lambda i: [i]), {}, ["a list ([0])", "strings, whole numbers"]),
    (lambda: labelled("dataset", lambda i: [i]), {}, ["a list ([0])", "strings, whole numbers"]),
    (lambda: labelled("dataset"), {"class_field": "labels"}, ["a list ([", "strings, whole"]),
    (Stream, {}, ["Stream", "is a stream", "load it whole", "group_taylor"]),
    (
        lambda: labelled("dataset").to_iterable_dataset(),
        {},
        ["IterableDataset", "is a stream", "load it whole"],
    ),
]


@pytest.mark.parametrize(("data", "config", "parts"), ROWS)
def test_mistakes_take_one_line(tmp_path, data, config, parts):
    with pytest.raises(SpftError) as caught:
        trained(tmp_path, data(), config=config)
    _check(caught.value, ["class_field", *parts])


def test_rows_with_several_sequences_are_refused(tmp_path):
    with pytest.raises(SpftError) as caught:
        trained(tmp_path, labelled("dataset"), data_collator=DataCollatorWithFlattening())
    _check(caught.value, ["has 1 rows but 4 classes", "one sequence", "pads"])

    args = arguments(tmp_path)
    args.packing = True  # as TRL's SFTConfig has it
    trainer = SpftTrainer(
        tiny_model(),
        args,
        train_dataset=labelled("list"),
        eval_dataset=dataset(8),
        spft_config=SpftConfig(**CONFIG),
    )
    with pytest.raises(SpftError) as caught:
        trainer.train()
    _check(caught.value, ["packing is True", "several sequences", "drop packing"])


def _check(error: SpftError, parts: list[str]) -> None:
    message, position = str(error), 0
    assert "\n" not in message
    for part in parts:
        position = message.find(part, position)
        assert position >= 0, f"{part!r} is missing, or out of order, in: {message}"

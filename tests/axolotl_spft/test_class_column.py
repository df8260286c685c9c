"""The class column of quantile_mean on its way through Axolotl.

Invariants: the class that arrives with a calibration row is that of the row's own text, whatever
shuffles, drops, cuts and pads rows in between; without the classes the batches are bit for bit
those of a run that knows no classes; the model never sees them; other YAMLs in the same process are
not touched.
"""

from __future__ import annotations

import json
import re

import pytest
import torch
from axolotl_runs import (
    WORDS,
    call,
    own_process_state,
    same_batches,
    spft_yaml,
    train,
    with_evaluation,
)
from oracles import quantile_mean
from safetensors.torch import load_file
from tiny_models import byte_tokenizer

from trainer_ext import SpftError
from trainer_ext.config.registry import METRICS
from trainer_ext.importance.class_column import CLASS_KEY
from trainer_ext.importance.metrics.quantile_mean import QuantileMean

BY_CLASS = {"spft_importance": "quantile_mean", "spft_class_field": "topic"}
EVERYTHING = {"spft_calibration_batches": 8, "max_steps": 2}  # an epoch holds 10 batches


@pytest.fixture(autouse=True)
def metric(monkeypatch):
    """quantile_mean that notes the classes which it has seen."""

    class Noting(QuantileMean):
        seen: list[torch.Tensor] = []

        def observe(self, run_batch):
            super().observe(run_batch)
            self.seen.append(self.row_classes.current.clone())

    monkeypatch.setitem(METRICS, "quantile_mean", Noting)
    return Noting


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows whose text tells their class; every sixth is too long for sequence_len."""
    path = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    path.write_text("".join(json.dumps(_row(i)) + "\n" for i in range(48)))
    return path


def _row(i: int) -> dict:
    word = WORDS[(i * i) % 5]
    answer = " ".join([word] * (30 if i % 6 == 0 else 1 + i % 4))
    return {
        "topic": word,
        "parity": i % 2,
        "messages": [
            {"role": "user", "content": f"say {word} {i}"},
            {"role": "assistant", "content": answer},
        ],
        "instruction": f"say {i}",
        "input": "",
        "output": answer,
        "text": answer,
    }


def _yaml(assets, rows, folder, **changes):
    return spft_yaml(
        assets,
        **{
            "datasets": [{"path": str(rows), "type": "chat_template"}],
            "dataset_prepared_path": str(folder / "prepared"),
            **BY_CLASS,
            **changes,
        },
    )


def _assert_right_classes(batches: list[dict]) -> None:
    tokenizer, present = byte_tokenizer(), sorted({_row(i)["topic"] for i in range(48)})
    for batch in batches:
        texts = tokenizer.batch_decode(batch["input_ids"])
        assert batch[CLASS_KEY].dtype == torch.int64
        assert len(texts) == len(batch[CLASS_KEY])
        for text, number in zip(texts, batch[CLASS_KEY].tolist(), strict=True):
            assert [word for word in WORDS if word in text] == [present[number]], text


def _without_classes(batches: list[dict]) -> list[dict]:
    return [{k: v for k, v in batch.items() if k != CLASS_KEY} for batch in batches]


WAYS = {
    "one process": {},
    "two processes": {"dataset_num_proc": 2},
    "two workers": {"dataloader_num_workers": 2},
    "accumulated": {"gradient_accumulation_steps": 2, "micro_batch_size": 2},
    "length groups": {"group_by_length": True},
    "every row trained on": {"train_on_inputs": True, "sequence_len": 128},
}


@pytest.mark.parametrize("way", WAYS)
def test_every_calibration_row_has_its_own_class(assets, tmp_path, rows, metric, way):
    keys = {**EVERYTHING, **WAYS[way]}
    plain = train(_yaml(assets, rows, tmp_path, spft_importance=None, **keys), tmp_path / "plain")
    with own_process_state():
        run = train(_yaml(assets, rows, tmp_path, **keys), tmp_path / "run")

    _assert_right_classes(run.calibration)
    assert len({int(number) for batch in run.calibration for number in batch[CLASS_KEY]}) == 3
    accumulation = keys.get("gradient_accumulation_steps", 1)
    assert torch.equal(torch.cat(metric.seen), _last_of_each(run.calibration, accumulation))

    assert len(plain.calibration) == 8 * accumulation
    assert all(CLASS_KEY not in batch for batch in plain.calibration)
    assert same_batches(_without_classes(run.calibration), plain.calibration)
    assert same_batches(_without_classes(run.batches), plain.batches)
    if accumulation == 1:  # the reference knows no micro batches
        _assert_scores_of_the_formula(assets, run)


def _assert_scores_of_the_formula(assets, run) -> None:
    """Of dense autograd on the recorded batches, each class run by itself."""
    scores = load_file(run.out / "spft_importance.safetensors")
    classes = [batch[CLASS_KEY].tolist() for batch in run.calibration]
    batches = _without_classes(run.calibration)
    expected = quantile_mean(assets.base_model().train(), batches, classes)
    for name, layer_scores in scores.items():
        error = (layer_scores - expected[name]).abs().max()
        assert error <= 1e-5 * expected[name].max(), name


def _last_of_each(batches: list[dict], accumulation: int) -> torch.Tensor:
    return torch.cat([batch[CLASS_KEY] for batch in batches[accumulation - 1 :: accumulation]])


@pytest.mark.parametrize(
    ("source", "sequence_len"),
    [
        ({"type": "alpaca"}, 512),  # tokenised one by one
        ({"type": "completion", "field": "text"}, 40),  # long rows are cut into several
    ],
    ids=["alpaca", "completion"],
)
@pytest.mark.parametrize("processes", [1, 2])
def test_other_strategies(assets, tmp_path, rows, source, sequence_len, processes):
    config = _yaml(assets, rows, tmp_path, datasets=[{"path": str(rows), **source}], max_steps=1)
    keys = {"sequence_len": sequence_len, "dataset_num_proc": processes}
    run = train({**config, **keys, "spft_calibration_batches": 8}, tmp_path / "run")
    assert len(run.calibration) == 8
    _assert_right_classes([*run.calibration, *run.batches])


def test_training_from_prepared_data(assets, tmp_path, rows):
    from axolotl.cli.preprocess import do_cli

    source = tmp_path / "rows.jsonl"
    source.write_text(rows.read_text())
    config = _yaml(assets, source, tmp_path, **EVERYTHING)
    plain = {**config, "spft_importance": "magnitude", "spft_class_field": None}
    with own_process_state():
        call(do_cli, config, tmp_path / "a")
    with own_process_state():  # must not take the place of what has the column
        call(do_cli, plain, tmp_path / "b")
    source.unlink()
    run = train(config, tmp_path / "run")
    _assert_right_classes(run.calibration)
    with own_process_state():
        other = train(plain, tmp_path / "other")
    assert same_batches(_without_classes(run.batches), other.batches)


def test_another_column_of_the_same_data(assets, tmp_path, rows):
    """Prepared data with one column does not stand in for data with another."""
    _assert_right_classes(train(_yaml(assets, rows, tmp_path), tmp_path / "topic").calibration)
    with own_process_state():
        run = train(_yaml(assets, rows, tmp_path, spft_class_field="parity"), tmp_path / "parity")
    for batch in run.calibration:
        texts = byte_tokenizer().batch_decode(batch["input_ids"])
        numbers = [int(re.search(r"say \w+ (\d+)", text)[1]) for text in texts]
        assert batch[CLASS_KEY].tolist() == [number % 2 for number in numbers]


def test_the_model_never_sees_the_classes(assets, tmp_path, rows):
    seen = set()

    def watch(trainer):
        forward = trainer.model.forward  # PEFT's, just below the hooks

        def watched(*args, **kwargs):
            seen.update(kwargs)
            return forward(*args, **kwargs)

        trainer.model.forward = watched

    keys = with_evaluation(assets, eval_strategy="steps", eval_steps=1)
    train(_yaml(assets, rows, tmp_path, **keys), tmp_path / "run", watch)
    assert "input_ids" in seen
    assert CLASS_KEY not in seen
    assert "topic" not in seen


@pytest.mark.parametrize("split", ["other data", "part of the training data"])
def test_evaluation_is_what_it_is_without_classes(assets, tmp_path, rows, split):
    keys = with_evaluation(assets) if split == "other data" else {"val_set_size": 8}
    keys |= {"eval_strategy": "steps", "eval_steps": 1, "include_tkps": True}
    run = train(_yaml(assets, rows, tmp_path, **keys), tmp_path / "run")
    keys |= {"spft_importance": None, "spft_class_field": None}  # the same neurons, no classes
    keys["spft_importance_file"] = str(run.out / "spft_importance.safetensors")
    with own_process_state():
        plain = train(_yaml(assets, rows, tmp_path, **keys), tmp_path / "plain")
    assert len(run.eval_losses) == 3  # before the first step as well
    assert run.eval_losses == plain.eval_losses
    assert run.losses == plain.losses


def test_evaluate_command_needs_no_classes(assets, tmp_path, rows):
    from axolotl.cli.evaluate import do_cli

    config = _yaml(assets, rows, tmp_path, **with_evaluation(assets))
    train(config, tmp_path / "run")
    for changes in ({}, {"lora_model_dir": str(tmp_path / "run")}):
        with own_process_state():
            call(do_cli, {**config, **changes}, tmp_path / "evaluated")


def test_other_yamls_are_not_touched(assets, tmp_path, rows):
    """Neither after a good run nor after one that failed inside the tokenisation."""
    from axolotl.datasets import TokenizedPromptDataset
    from axolotl.utils.data import sft, shared

    parts = (
        lambda: TokenizedPromptDataset.process,
        lambda: sft._load_and_process_single_dataset,
        lambda: shared.DATASET_HASH_CONFIG_EXTRA_FIELDS,
    )
    before = [part() for part in parts]
    train(_yaml(assets, rows, tmp_path, max_steps=1), tmp_path / "good")
    assert [part() for part in parts] == before
    with own_process_state(), pytest.raises(SpftError):
        train(_yaml(assets, rows, tmp_path, spft_class_field="nope"), tmp_path / "bad")
    assert [part() for part in parts] == before


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        (
            {"spft_class_field": "tpic"},
            ["spft_class_field is 'tpic'", "rows.jsonl", "topic, parity", "name the one"],
        ),
        ({"spft_class_field": "input"}, ["spft_class_field", "single-valued ('')", "at least two"]),
        ({"spft_class_field": None}, ["spft_class_field is not set", "name the dataset column"]),
        ({"sample_packing": True}, ["sample_packing is True", "several sequences", "drop it"]),
        (
            {"streaming": True, "dataset_prepared_path": None},
            ["streaming is True", "stream cannot be known", "drop it"],
        ),
        (
            {"datasets": None, "pretraining_dataset": [{"path": "json", "type": "pretrain"}]},
            ["pretraining_dataset is [", "stream cannot be known", "use datasets"],
        ),
    ],
    ids=str,
)
def test_mistakes_take_one_line(assets, tmp_path, rows, changes, parts):
    with pytest.raises(SpftError) as caught:
        train(_yaml(assets, rows, tmp_path, **changes), tmp_path / "run")
    message, position = str(caught.value), 0
    assert "\n" not in message
    for part in parts:
        position = message.find(part, position)
        assert position >= 0, f"{part!r} is missing, or out of order, in: {message}"
    assert not list(tmp_path.glob("run/adapter_model*"))

"""Fingerprints: a model's is the same for every dtype it is loaded in and differs for other
weights; data's is the same for the same rows in any order, padding and grouping, and differs for
other rows. A scores file of another model is refused with what differs; other data or another
metric only warn."""

from __future__ import annotations

import dataclasses
import logging
from types import SimpleNamespace

import pytest
import torch
from adapters import wrapped
from calibrations import runs
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import batch, dataset, tiny_model
from transformers import TrainingArguments

from trainer_ext import ImportanceScores, SpftConfig, SpftError, SpftTrainer, measure_importance
from trainer_ext.calibration.fingerprints import (
    DataFingerprint,
    check_same_model,
    model_fingerprint,
)
from trainer_ext.calibration.run import load_scores
from trainer_ext.tuner.model import spft_layers


def fingerprint(model) -> str:
    return model_fingerprint(model, spft_layers(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_model_is_itself_in_every_dtype(dtype):
    check_same_model(fingerprint(wrapped()), fingerprint(wrapped(dtype=dtype)))


def test_a_longer_vocabulary_and_a_trained_copy_of_it_do_not_matter():
    grown = wrapped()
    old = grown.get_input_embeddings().weight
    grown.set_input_embeddings(torch.nn.Embedding(300, 32))
    grown.get_input_embeddings().weight.data[:260] = old.data
    check_same_model(fingerprint(wrapped()), fingerprint(grown))
    copied = wrapped(modules_to_save=["embed_tokens"])
    check_same_model(fingerprint(wrapped()), fingerprint(copied))


@pytest.mark.parametrize("part", ["model.layers.1.mlp.up_proj", "model.embed_tokens"])
def test_other_weights_are_noticed(part):
    other = wrapped()
    module = other.get_base_model().get_submodule(part)
    weight = getattr(module, "base_layer", module).weight
    with torch.no_grad():
        weight += 0.05 * torch.randn_like(weight)
    name = "input embeddings" if part.endswith("tokens") else part
    with pytest.raises(SpftError, match=f"weights of {name} are not those"):
        check_same_model(fingerprint(wrapped()), fingerprint(other))


def tokens(*rows) -> SimpleNamespace:
    """A calibration batch of one micro batch, padded on the right."""
    width = max(map(len, rows), default=0) + 1
    ids = torch.full((len(rows), width), 256)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row, dtype=torch.long)
    mask = (torch.arange(width)[None] < torch.tensor([[len(row)] for row in rows])).long()
    labels = torch.where(mask.bool(), ids, -100)
    return SimpleNamespace(
        micro_batches=[{"input_ids": ids, "attention_mask": mask, "labels": labels}]
    )


def value_of(batches) -> str:
    data = DataFingerprint()
    assert list(data.noting(batches)) == list(batches)
    return data.value()


ROWS = st.lists(st.lists(st.integers(0, 255), min_size=1, max_size=6), min_size=1, max_size=8)


@given(ROWS, st.randoms())
def test_order_padding_and_grouping_do_not_matter(rows, random):
    shuffled = random.sample(rows, len(rows))
    cut = random.randint(0, len(rows) - 1)
    groups = [group for group in (shuffled[:cut], shuffled[cut:]) if group]
    assert value_of([tokens(*rows)]) == value_of([tokens(*group) for group in groups])


@given(ROWS)
def test_other_rows_matter(rows):
    more = [*rows, [1, 2, 3]]
    changed = [*rows[:-1], [*rows[-1], 7]]
    assert len({value_of([tokens(*r)]) for r in (rows, more, changed)}) == 3


def test_labels_count_and_other_inputs_are_hashed_whole():
    one, other = tokens([1, 2, 3]), tokens([1, 2, 3])
    other.micro_batches[0]["labels"][0, 0] = -100
    assert value_of([one]) != value_of([other])
    pixels = [
        SimpleNamespace(micro_batches=[{"pixels": torch.full((2, 3), x)}]) for x in (0.0, 1.0)
    ]
    assert value_of(pixels[:1]) != value_of(pixels[1:])
    assert value_of(pixels) == value_of(pixels[::-1])


@pytest.fixture
def scores_file(tmp_path):
    model = wrapped(importance="group_taylor")
    scores = measure_importance(model, runs(model, [batch(0), batch(1)]))
    scores.save(tmp_path / "scores")
    return tmp_path / "scores"


def test_a_file_of_this_model_is_accepted_and_says_where_it_is_from(scores_file):
    scores = load_scores(scores_file, wrapped(dtype=torch.bfloat16, importance="group_taylor"))
    assert scores.metadata["seed"] == "42"
    assert '"torch"' in scores.metadata["versions"]
    assert scores.batches == 2


def test_a_file_of_another_model_is_refused(scores_file):
    other = wrapped()
    with torch.no_grad():
        for layer in spft_layers(other).values():
            layer.get_base_layer().weight.normal_(std=0.2)
    with pytest.raises(
        SpftError, match=r"importance_file is .*scores': the weights of model\.layers"
    ):
        load_scores(scores_file, other)
    scores = ImportanceScores.load(scores_file)
    for old, new, message in [
        ('"model_type": "llama"', '"model_type": "qwen2"', "made for a qwen2 model, but this is"),
        ('q_proj": 32', 'q_proj": 31', "q_proj has 31 inputs in the file's model but 32 in this"),
    ]:
        metadata = {**scores.metadata, "model": scores.metadata["model"].replace(old, new)}
        assert metadata != scores.metadata
        dataclasses.replace(scores, metadata=metadata).save(scores_file)
        with pytest.raises(SpftError, match=message):
            load_scores(scores_file, wrapped())


def test_another_metric_only_warns(scores_file, caplog):
    load_scores(scores_file, wrapped(importance="wanda"))
    assert "holds group_taylor scores although importance is wanda" in caplog.text


def trained(folder, data, **fields) -> SpftTrainer:
    arguments = TrainingArguments(
        str(folder),
        max_steps=2,
        per_device_train_batch_size=4,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    config = SpftConfig(r=4, calibration_batches=2, **fields)
    trainer = SpftTrainer(tiny_model(), arguments, train_dataset=data, spft_config=config)
    trainer.train()
    return trainer


def test_other_data_only_warns(tmp_path, caplog):
    trained(tmp_path / "a", dataset(16))
    file = str(tmp_path / "a" / "spft_importance.safetensors")
    with caplog.at_level(logging.WARNING):
        trained(tmp_path / "b", dataset(16), importance_file=file)
        assert "was made on other data" not in caplog.text
        trained(tmp_path / "c", dataset(16, seed=1), importance_file=file)
    assert "was made on other data than the first 2 batches of this run" in caplog.text


def test_training_by_a_file_is_training_by_the_calibration_that_wrote_it(tmp_path):
    """Bit for bit, and the file says the same but for the time that it took."""
    calibrated = trained(tmp_path / "a", dataset(16))
    file = str(tmp_path / "a" / "spft_importance.safetensors")
    by_file = trained(tmp_path / "b", dataset(16), importance_file=file)
    states = [t.model.state_dict() for t in (calibrated, by_file)]
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])
    copies = [ImportanceScores.load(tmp_path / run / "spft_importance.safetensors") for run in "ab"]
    for name, scores in copies[0].scores.items():
        assert torch.equal(scores, copies[1].scores[name])
    assert copies[0].metadata == copies[1].metadata

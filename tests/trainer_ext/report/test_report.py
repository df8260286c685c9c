"""The report's figures are those of the run, counted independently; the page holds its pictures
inside itself and loads nothing."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
import torch
from adapters import selected
from packaging.version import Version
from tiny_models import dataset, tiny_model
from transformers import TrainingArguments

from trainer_ext import ImportanceScores, SpftConfig, SpftTrainer, current_selection
from trainer_ext.report.figures import RunFigures, optimizer_state_bytes, write_report


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    arguments = TrainingArguments(
        str(folder),
        max_steps=4,
        logging_steps=1,
        eval_strategy="steps",
        eval_steps=2,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
    )
    trainer = SpftTrainer(
        tiny_model(),
        arguments,
        train_dataset=dataset(),
        eval_dataset=dataset(8, seed=1),
        spft_config=SpftConfig(r=4, calibration_batches=2),
    )
    trainer.train()
    return trainer, folder, json.loads((folder / "spft_report.json").read_text())


def test_parameters_and_bytes_are_those_of_the_model(run):
    trainer, _, report = run
    # r = 4 rows of d_in weights: 2 blocks of q, k, v, o, gate, up (32 in) and down (48 in)
    assert report["trainable_parameters"] == 2 * 4 * (6 * 32 + 48)
    assert report["base_parameters"] == tiny_model().num_parameters()
    assert report["trainable_share"] == pytest.approx(
        report["trainable_parameters"] / report["base_parameters"]
    )
    # two fp32 moments a parameter, and one fp32 step counter a tensor
    tensors = sum(1 for p in trainer.model.parameters() if p.requires_grad)
    assert report["optimizer_state_bytes"] == 8 * report["trainable_parameters"] + 4 * tensors


def test_the_agreement_of_halves_is_that_of_the_scores(run):
    _, folder, report = run
    stability = ImportanceScores.load(folder / "spft_importance.safetensors").stability
    assert report["calibration"]["agreement_of_halves"] == stability.agreement
    for name, layer in report["layers"].items():
        assert layer["overlap_of_halves"] == stability.overlap[name]
        assert layer["overlap_by_chance"] == pytest.approx(4 / layer["neurons"])
    page = (folder / "spft_report.html").read_text()
    assert f"agree by {stability.agreement:.2f} beyond chance" in page
    assert page.count("halves share") == 2 * len(report["layers"])  # under both pictures
    warnings = report["calibration"]["warnings"]  # two batches of a random model: surely poor
    assert "two halves of 2 batches agree by" in warnings[0]
    assert "`" not in warnings[0]
    assert warnings[0] in page


def test_no_agreement_is_reported_for_another_number_of_neurons(run, tmp_path):
    _, folder, _ = run
    scores = ImportanceScores.load(folder / "spft_importance.safetensors")
    report = write_report(tmp_path, selected(r=5), "default", scores, RunFigures())
    assert report["calibration"]["agreement_of_halves"] is None
    assert not any("overlap_of_halves" in layer for layer in report["layers"].values())


def test_curves_are_the_trainers_log(run):
    trainer, _, report = run
    log = trainer.state.log_history
    assert report["train_loss"] == [[e["step"], e["loss"]] for e in log if "loss" in e]
    assert report["held_out_loss"] == [[e["step"], e["eval_loss"]] for e in log if "eval_loss" in e]
    assert len(report["train_loss"]) == 4
    assert [step for step, _ in report["held_out_loss"]] == [2, 4]
    assert report["steps_timed"] == 4
    assert report["step_seconds"] > 0


def test_layers_are_those_of_the_selection(run):
    trainer, folder, report = run
    scores = ImportanceScores.load(folder / "spft_importance.safetensors")
    for name, index in current_selection(trainer.model).index.items():
        layer = report["layers"][name]
        assert layer["selected"] == index.tolist()
        ordered = scores.scores[name].sort(descending=True).values
        assert layer["neurons"] == len(ordered)
        assert layer["cut_score"] == ordered[3].item()
        assert layer["highest_score"] == ordered[0].item()
        share = ordered[:4].sum() / ordered.sum()
        assert layer["selected_score_share"] == pytest.approx(share.item())
    assert report["calibration"]["batches"] == 2
    # a package's metadata need not have the name of the build, such as +cu130
    assert Version(report["versions"]["torch"]).public == Version(torch.__version__).public


class _Tags(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.tags, self.attributes = [], [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs


def test_the_page_is_self_contained_and_has_a_picture_for_every_layer(run):
    _, folder, report = run
    page = (folder / "spft_report.html").read_text()
    parser = _Tags()
    parser.feed(page)
    # scores and positions for each layer, and the loss curve
    assert parser.tags.count("svg") == 2 * len(report["layers"]) + 1
    assert not {"script", "link", "img", "iframe"} & set(parser.tags)
    assert not [v for k, v in parser.attributes if k in ("src", "href")]
    assert set(re.findall(r"https?://[^'\"]+", page)) <= {"http://www.w3.org/2000/svg"}
    for name in report["layers"]:
        assert page.count(name) == 2


def test_base_parameters_are_the_base_models(tmp_path):
    model = selected("llama_bias", modules_to_save=["lm_head"])
    model.add_adapter("second", SpftConfig(r=2, importance="random"))
    report = write_report(tmp_path, model, "default", None, RunFigures())
    assert report["base_parameters"] == tiny_model("llama_bias").num_parameters()


def test_without_scores_the_report_still_comes(tmp_path):
    report = write_report(tmp_path, selected(), "default", None, RunFigures())
    assert report["calibration"] is None
    assert report["step_seconds"] is None
    page = (tmp_path / "spft_report.html").read_text()
    assert "loaded with the adapter" in page
    assert "No loss was logged" in page


def test_names_are_escaped_in_the_page(tmp_path):
    model = selected()
    model.peft_config["default"].base_model_name_or_path = "<script>alert(1)</script>"
    write_report(tmp_path, model, "default", None, RunFigures())
    assert "<script>" not in (tmp_path / "spft_report.html").read_text()


def test_optimizer_bytes_count_every_state_tensor():
    parameter = torch.nn.Parameter(torch.zeros(10, 3))
    optimizer = torch.optim.AdamW([parameter])
    assert optimizer_state_bytes(optimizer) == 0
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer_state_bytes(optimizer) == 2 * 30 * 4 + 4

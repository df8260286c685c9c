"""Axolotl's other commands on SPFT: preprocess, evaluate, inference, merge-lora.

Invariants: without `lora_model_dir` they show the base model exactly; with it, the base weights
plus the saved rows, which is also what merge-lora writes - and nothing outside those rows.
"""

from __future__ import annotations

import csv
import io
import shutil
import sys

import pytest
import torch
from axolotl_runs import (
    call,
    layers_of,
    own_process_state,
    same_tensors,
    spft_yaml,
    train,
    with_delta,
    with_evaluation,
)
from safetensors.torch import load_file
from tiny_models import byte_tokenizer

LONG = {"max_steps": 6, "learning_rate": 0.3}


@pytest.fixture(scope="module")
def trained(assets, tmp_path_factory):
    """output_dir of a run that changed the model a lot."""
    with own_process_state():
        config = spft_yaml(assets, **with_evaluation(assets), **LONG)
        return train(config, tmp_path_factory.mktemp("trained") / "out").out


def test_preprocess_prepares_what_train_uses(assets, tmp_path):
    from axolotl.cli.preprocess import do_cli

    source = tmp_path / "train.jsonl"
    shutil.copy(assets.train, source)
    config = spft_yaml(
        assets,
        datasets=[{"path": str(source), "type": "chat_template"}],
        dataset_prepared_path=str(tmp_path / "prepared"),
    )
    with own_process_state():
        call(do_cli, config, tmp_path / "out")
    assert not list((tmp_path / "out").glob("adapter*"))
    source.unlink()  # train must live on the prepared data
    run = train(config, tmp_path / "out")
    reference = train(spft_yaml(assets), tmp_path / "reference")
    assert same_tensors(run.tensors, reference.tensors)


def _evaluate(config, out) -> float:
    from axolotl.cli.evaluate import do_cli

    with own_process_state():
        call(do_cli, config, out)
    with (out / "eval_summary.csv").open() as file:
        return float({row["metric"]: row["validation"] for row in csv.DictReader(file)}["loss"])


def test_evaluate_shows_the_base_model_or_the_adapter(assets, tmp_path, trained):
    spft = spft_yaml(assets, **with_evaluation(assets))
    bare = spft_yaml(
        assets,
        **with_evaluation(assets, plugins=None, adapter=None, spft_r=None),
        spft_calibration_batches=None,
    )
    base_loss = _evaluate(bare, tmp_path / "base")
    assert _evaluate(spft, tmp_path / "fresh") == base_loss

    merged = tmp_path / "merged_by_hand"
    model = assets.base_model()
    model.load_state_dict(with_delta(assets, trained), strict=False)
    model.save_pretrained(merged)
    byte_tokenizer().save_pretrained(merged)
    expected = _evaluate({**bare, "base_model": str(merged)}, tmp_path / "by_hand")
    adapted = _evaluate({**spft, "lora_model_dir": str(trained)}, tmp_path / "adapted")
    assert adapted == pytest.approx(expected, abs=1e-5)
    assert adapted < base_loss - 0.1


def _say(config, out, monkeypatch, capsys) -> str:
    """What `axolotl inference` prints for one prompt, decoding greedily."""
    from axolotl.cli import inference

    sampling = inference.GenerationConfig

    def greedy(**options):
        chosen = {"do_sample": False, "max_new_tokens": 12, "repetition_penalty": 1.0}
        return sampling(**{**options, **chosen})

    monkeypatch.setattr(inference, "GenerationConfig", greedy)
    monkeypatch.setattr(sys, "stdin", io.StringIO("say beta 7"))
    capsys.readouterr()
    with own_process_state():
        call(inference.do_cli, config, out)
    return capsys.readouterr().out


def _expected_text(model) -> str:
    tokenizer = byte_tokenizer()
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "say beta 7"}], add_generation_prompt=True, return_tensors="pt"
    )
    tokens = model.generate(**prompt, do_sample=False, max_new_tokens=12)
    return tokenizer.decode(tokens[0].tolist())


@pytest.mark.parametrize("with_adapter", [False, True])
def test_inference_speaks_as_the_base_model_or_the_adapter(
    assets, tmp_path, trained, monkeypatch, capsys, with_adapter
):
    config = spft_yaml(assets, **({"lora_model_dir": str(trained)} if with_adapter else {}))
    printed = _say(config, tmp_path / "out", monkeypatch, capsys)
    base, adapted = assets.base_model(), assets.base_model()
    adapted.load_state_dict(with_delta(assets, trained), strict=False)
    said_by_base, said_by_adapted = _expected_text(base), _expected_text(adapted)
    assert said_by_base != said_by_adapted
    assert (said_by_adapted in printed) == with_adapter
    assert (said_by_base in printed) == (not with_adapter)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_merge_lora_changes_the_selected_rows_only(assets, tmp_path, precision):
    from axolotl.cli.merge_lora import do_cli

    base = assets.model if precision == "fp32" else assets.model_bf16
    config = spft_yaml(assets, base_model=str(base), bf16=precision == "bf16", **LONG)
    run = train(config, tmp_path / "out")
    with own_process_state():
        call(do_cli, config, tmp_path / "out")

    merged = load_file(run.out / "merged" / "model.safetensors")
    assert same_tensors(merged, with_delta(assets, run.out, base))
    before, layers = load_file(base / "model.safetensors"), layers_of(run.tensors)
    for name, tensor in before.items():
        same_rows = (merged[name] == tensor).all(dim=-1)
        layer = layers.get(name.removesuffix(".weight"))
        if layer is None:
            assert same_rows.all(), name
        else:
            outside = torch.ones(len(tensor), dtype=torch.bool)
            outside[layer["index"]] = False
            assert same_rows[outside].all(), name
            assert not same_rows[~outside].any(), name


def test_merge_lora_merges_the_named_folder(assets, tmp_path, trained):
    """`--lora-model-dir` of the command line, with another output_dir."""
    from axolotl.cli.merge_lora import do_cli

    call(do_cli, spft_yaml(assets), tmp_path / "elsewhere", lora_model_dir=str(trained))
    merged = load_file(tmp_path / "elsewhere" / "merged" / "model.safetensors")
    assert same_tensors(merged, with_delta(assets, trained))

"""The DPO quickstart at tiny size, whole: it trains on derived pairs and measures rewards on
held-out ones. Train and held-out pairs share no module, and a pair's rejected answer is another
function's of the same module. Intervals are Wilson's; log-ratios are those of the plain model."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import byte_tokenizer, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def dpo(load_script, monkeypatch):
    """quickstart/dpo.py as a module, its siblings importable as they are for the script."""
    monkeypatch.syspath_prepend(str(ROOT / "quickstart"))
    yield load_script("dpo")
    for name in ("evaluate", "prepare_data", "prepare_model", "preference_pairs"):
        sys.modules.pop(name, None)


def test_pairs_are_derived_from_siblings(dpo):
    pairs = dpo.preference_pairs
    train, held_out = pairs.train_and_held_out()
    assert len(train) == pairs.MAX_TRAIN_PAIRS
    assert len(held_out) == pairs.MAX_HELD_OUT_PAIRS >= 200
    modules = {}
    for pair in dpo.prepare_data.collect_pairs(Path(json.__file__).parents[1]):
        prompt = dpo.prepare_data.PROMPT.format(source=pair.source)
        modules[prompt] = modules[pair.docstring] = pair.module
    sides = []
    for rows in (train, held_out):
        for row in rows:
            prompt, chosen, rejected = (
                row[k][0]["content"] for k in ("prompt", "chosen", "rejected")
            )
            assert chosen != rejected
            assert modules[prompt] == modules[chosen] == modules[rejected]
        sides.append({modules[row["prompt"][0]["content"]] for row in rows})
    assert not sides[0] & sides[1]


def test_the_interval_is_wilsons(dpo):
    # Newcombe 1998, table I: 81 of 263
    figures = dpo.interval(81, 263)
    assert figures["share"] == 81 / 263
    assert (figures["low"], figures["high"]) == pytest.approx((0.2553, 0.3662), abs=5e-5)


def test_it_trains_and_measures(dpo, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    model = tmp_path / "model"
    tiny_model().save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    rows = [
        {
            "prompt": [{"role": "user", "content": f"say {word}"}],
            "chosen": [{"role": "assistant", "content": word}],
            "rejected": [{"role": "assistant", "content": word[::-1]}],
        }
        for word in ("abc", "bcd", "cde", "def") * 4
    ]
    monkeypatch.setattr(dpo, "MODEL", model)
    monkeypatch.setattr(dpo.prepare_model, "main", lambda arguments: 0)
    monkeypatch.setattr(dpo.preference_pairs, "train_and_held_out", lambda: (rows, rows[:4]))
    assert dpo.main(["--max-steps", "3", "--r", "4", "--output", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "dpo.json").read_text())
    assert result["pairs"] == 4
    assert result["mean_margin"] != 0
    assert "right answer has the higher reward" in capsys.readouterr().out
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()

    # the start's log-ratios, by the plain model, one answer at a time
    base = AutoModelForCausalLM.from_pretrained(model).eval()
    tokenizer = AutoTokenizer.from_pretrained(model)
    ratios = dpo.log_ratios(base, tokenizer, rows[:4])
    for ratio, row in zip(ratios, rows, strict=False):
        sums = []
        for kind in ("chosen", "rejected"):
            ids, labels = dpo.encode(row["prompt"] + row[kind], tokenizer)
            count = sum(label != -100 for label in labels)
            loss = base(input_ids=torch.tensor([ids]), labels=torch.tensor([labels])).loss
            sums.append(-loss.item() * count)
        assert ratio.item() == pytest.approx(sums[0] - sums[1], rel=1e-4, abs=1e-4)

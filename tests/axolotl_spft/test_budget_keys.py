"""The keys that set numbers of neurons reach the adapter, a run with a global budget is resumed and
continued with the numbers that it began with, and other numbers are refused in one line."""

from __future__ import annotations

import json

import pytest
from axolotl_runs import layers_of, own_process_state, spft_yaml, train

from trainer_ext import ImportanceScores, SpftError


@pytest.fixture(scope="module")
def scores(assets, tmp_path_factory):
    """Scores of a uniform run, and others by which the layers get other numbers."""
    folder = tmp_path_factory.mktemp("scores")
    with own_process_state():
        out = train(spft_yaml(assets, max_steps=1), folder / "uniform").out
    path = out / "spft_importance.safetensors"
    other = ImportanceScores.load(path)
    for depth, values in enumerate(other.scores.values()):
        values.pow_(depth % 3)
    other.save(folder / "other")
    return path, folder / "other"


def counts(run) -> dict[str, int]:
    return {name: len(layer["index"]) for name, layer in layers_of(run.tensors).items()}


def budget_yaml(assets, path, **changes) -> dict:
    return spft_yaml(
        assets,
        **{
            "spft_allocation": "global",
            "spft_importance_file": str(path),
            "spft_r_pattern": {"down_proj": 6, r"layers\.1\.self_attn.*": 3},
            "spft_density_pattern": {"up_proj": 0.5},
            "save_strategy": "steps",
            "save_steps": 1,
            **changes,
        },
    )


def test_keys_reach_the_adapter(assets, tmp_path, scores):
    run = train(budget_yaml(assets, scores[0], spft_allocation_ceiling=2), tmp_path / "out")
    saved = json.loads((run.out / "adapter_config.json").read_text())
    assert saved["allocation_ceiling"] == 2
    allocated = saved["allocated"]
    for name, count in counts(run).items():
        if "down_proj" in name:
            assert count == 6
        elif "layers.1.self_attn" in name:
            assert count == 3
        elif "up_proj" in name:
            assert count == 24
        else:
            assert count == allocated.pop(name) <= 8
    assert not allocated


def test_resuming_and_continuing_keep_the_numbers(assets, tmp_path, scores):
    config = budget_yaml(assets, scores[0])
    first = train({**config, "max_steps": 1}, tmp_path / "out")
    before = counts(first)
    resumed = train({**config, "auto_resume_from_checkpoints": True}, tmp_path / "out")
    assert resumed.trainer.state.global_step == 2
    assert counts(resumed) == before
    continued = train({**config, "lora_model_dir": str(first.out)}, tmp_path / "more")
    assert counts(continued) == before
    other = {**config, "spft_importance_file": str(scores[1]), "max_steps": 3}
    with pytest.raises(SpftError) as caught:
        train({**other, "auto_resume_from_checkpoints": True}, tmp_path / "out")
    message = str(caught.value)
    assert "\n" not in message
    for part in ("checkpoint-2", "other numbers of neurons", "spft_importance_file", "output_dir"):
        assert part in message

"""The README's commands exist and its code runs as it stands: the YAML trains through Axolotl and
the Python blocks train, save and merge, all at tiny size; its table of keys is the plugin's."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import keys_table
import pytest
import trl_runs
import yaml
from tiny_models import batch, dataset, tiny_model
from transformers import AutoModelForCausalLM

from axolotl_spft import SPFTArgs
from axolotl_spft.args import read_args
from axolotl_spft.checks import refuse_unsupported
from trainer_ext import SpftConfig
from trainer_ext.tuner.model import deltas, spft_layers

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize("command", re.findall(r"^make [a-z-]+|`make [a-z-]+`", README, flags=re.M))
def test_make_commands_exist(command):
    target = command.strip("`").split()[1]
    done = subprocess.run(["make", "-n", target], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_two_commands_are_the_first_thing_to_type():
    lines = [line.split("#")[0].strip() for line in blocks("sh")[0].splitlines()]
    assert lines == ["make quickstart", "make test"]


def test_the_trainers_python_block_runs(tmp_path, monkeypatch):
    code, _, _ = blocks("python")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name: tiny_model())
    # the tiny model's layers are smaller than 64, and a hundred steps teach the test nothing
    code = code.replace("r=64", "r=4").replace("max_steps=100", "max_steps=2, use_cpu=True")
    names = {"train_dataset": dataset()}
    exec(compile(code, "README.md", "exec"), names)
    assert (tmp_path / "outputs/spft/adapter_model.safetensors").is_file()
    assert type(names["merged"]) is type(tiny_model())


def test_the_trl_python_block_runs(tmp_path, monkeypatch):
    _, code, _ = blocks("python")
    monkeypatch.chdir(tmp_path)
    tiny_model().save_pretrained("base")
    trl_runs.tokenizer.save_pretrained("base")
    code = code.replace("HuggingFaceTB/SmolLM2-135M-Instruct", "base").replace("r=64", "r=4")
    code = code.replace("max_steps=100", "max_steps=2, use_cpu=True, bf16=False, report_to=[]")
    names = {"conversations": trl_runs.completions(), "preference_pairs": trl_runs.pairs()}
    exec(compile(code, "README.md", "exec"), names)
    for run in (names["sft"], names["dpo"]):
        assert run.state.global_step == 2
    assert all(delta.weight.abs().sum() > 0 for delta in deltas(names["dpo"].model).values())


def test_the_loops_python_block_runs_and_writes_through(monkeypatch):
    _, _, code = blocks("python")
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda name: tiny_model())
    names = {"batches": [batch(seed) for seed in range(3)]}
    exec(compile(code.replace("r=64", "r=4"), "README.md", "exec"), names)
    assert all(delta.weight.abs().sum() > 0 for delta in deltas(names["model"]).values())
    assert all(layer.written is not None for layer in spft_layers(names["model"]).values())


def test_the_yaml_block_is_accepted_by_the_plugin():
    (text,) = blocks("yaml")
    config = yaml.safe_load(text)
    assert config["adapter"] == "prune_spft"
    assert read_args(config).spft_r == 64
    # it is the example that tests/example_configs trains at tiny size
    assert config == yaml.safe_load((ROOT / "example_configs" / "sft.yml").read_text())
    refuse_unsupported(config)


def test_the_diff_changes_two_lines():
    (text,) = blocks("diff")
    added = [line[1:] for line in text.splitlines() if line.startswith("+")]
    assert yaml.safe_load("\n".join(added)) == {
        "plugins": ["axolotl_spft.SPFTPlugin"],
        "adapter": "prune_spft",
    }


def test_the_table_of_keys_is_made_from_the_fields():
    """Else: python tests/support/keys_table.py"""
    assert keys_table.in_readme() == keys_table.keys_table()


def test_the_table_of_keys_is_complete_and_its_defaults_are_true():
    rows = dict(re.findall(r"^\| `(spft_\w+)` \| (.*?) \|", README, flags=re.M))
    del rows["spft_importance"], rows["spft_r"]  # both appear in prose or in two tables
    assert set(rows) | {"spft_importance", "spft_r"} == set(SPFTArgs.model_fields)
    config = SpftConfig()
    for key, default in rows.items():
        value = getattr(config, key.removeprefix("spft_"))
        if value is not None:
            assert default.strip("`") == str(value), key

"""Every YAML in example_configs/ trains, at tiny size.

Invariants: each file is used as it is but for where the model and the data are and how large the
run is; it writes an adapter whose rows have moved, and its keys are known to Axolotl or to us.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from axolotl_runs import layers_of, train

from axolotl_spft import SPFTArgs

FOLDER = Path(__file__).parents[2] / "example_configs"
EXAMPLES = sorted(FOLDER.glob("*.y*ml"))


def tiny(example: dict, assets) -> dict:
    """The example on the tiny model, with two steps on two cores; everything else is its own."""
    config = {
        **example,
        "base_model": str(assets.model_bf16 if example.get("bf16") else assets.model),
        "datasets": [_here(source, assets.train) for source in example["datasets"]],
        "dataset_prepared_path": None,
        "sequence_len": 96,
        "micro_batch_size": 1,
        "max_steps": 2,
        "warmup_steps": 1,
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "save_strategy": "no",
        "tf32": False,
        "attn_implementation": "sdpa",
    }
    if example.get("bf16"):
        config["bf16"] = True  # "auto" finds no GPU here
    else:
        config |= {"bf16": False, "fp16": False}
    if example.get("test_datasets"):
        config["test_datasets"] = [_here(s, assets.held) for s in example["test_datasets"]]
    if example.get("val_set_size", 0) >= 1:
        config["val_set_size"] = 4
    if "spft_density" not in example:
        config["spft_r"] = 4
    dropped = ("save_steps", "num_epochs", "dataset_prepared_path")
    return {k: v for k, v in config.items() if k not in dropped}


def _here(source: dict, path: Path) -> dict:
    return {**source, "path": str(path), "ds_type": "json", "split": "train"}


def test_there_are_examples():
    assert FOLDER / "quickstart.yml" in EXAMPLES


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_example_trains(assets, tmp_path, path):
    example = yaml.safe_load(path.read_text())
    run = train(tiny(example, assets), tmp_path / "out")
    layers = layers_of(run.tensors)
    assert layers
    for name, layer in layers.items():
        assert layer["weight"].any(), f"{name} has not moved"
    assert (run.out / "spft_report.html").is_file()


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.name)
def test_keys_of_the_example_are_known(path):
    """Axolotl drops unknown keys without a word."""
    from axolotl.utils.schemas.config import AxolotlInputConfig

    known = AxolotlInputConfig.model_fields.keys() | SPFTArgs.model_fields.keys()
    assert yaml.safe_load(path.read_text()).keys() <= known

"""Every YAML in example_configs/ trains, at tiny size: those for one process here.

Invariants: each file is used as it is but for where the model and the data are and how large the
run is; it writes an adapter that has moved, and its keys are known to Axolotl or to us. The LoRA
YAML and its SPFT twin differ in two keys.
"""

from __future__ import annotations

import pytest
from axolotl_runs import layers_of, own_process_state, train
from examples import FOLDER, PATHS, ROOT, engine_of, read, tiny

from axolotl_spft import SPFTArgs

ALONE = [path for path in PATHS if engine_of(path) is None]


def test_there_are_examples():
    assert FOLDER / "quickstart.yml" in ALONE
    assert len(ALONE) < len(PATHS)


@pytest.mark.parametrize("path", ALONE, ids=lambda path: path.name)
def test_example_trains(assets, tmp_path, path):
    example, config = read(path), tiny(read(path), assets)
    if "lora_model_dir" in example:
        before = next(p for p in ALONE if read(p)["output_dir"] == example["lora_model_dir"])
        config["lora_model_dir"] = str(tmp_path / "before")
        with own_process_state():
            train(tiny(read(before), assets), tmp_path / "before")
    run = train(config, tmp_path / "out")
    if example["adapter"] == "lora":
        assert all(tensor.any() for name, tensor in run.tensors.items() if "lora_B" in name)
        return
    layers = layers_of(run.tensors)
    assert layers
    for name, layer in layers.items():
        assert layer["weight"].any(), f"{name} has not moved"
    assert (run.out / "spft_report.html").is_file()


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_keys_of_the_example_are_known(path):
    """Axolotl drops unknown keys without a word."""
    from axolotl.utils.schemas.config import AxolotlInputConfig
    from axolotl.utils.schemas.fsdp import FSDPConfig

    known = AxolotlInputConfig.model_fields.keys() | SPFTArgs.model_fields.keys()
    assert read(path).keys() <= known
    assert read(path).get("fsdp_config", {}).keys() <= FSDPConfig.model_fields.keys()


def test_a_lora_yaml_becomes_spft_by_two_keys():
    lora, spft = read(FOLDER / "sft-lora.yml"), read(FOLDER / "sft-lora-to-spft.yml")
    assert spft == {**lora, "plugins": ["axolotl_spft.SPFTPlugin"], "adapter": "prune_spft"}
    assert lora["adapter"] == "lora"
    assert "plugins" not in lora


def test_the_table_of_examples_is_complete_and_its_commands_name_what_exists():
    text = (FOLDER / "README.md").read_text()
    files = [p for p in FOLDER.rglob("*") if p.is_file() and p.name != "README.md"]
    for path in files:
        assert f"`{path.relative_to(FOLDER).as_posix()}`" in text, path.name
    for word in text.replace("`", " ").split():
        if word.startswith("example_configs/") and "*" not in word:
            assert (ROOT / word).is_file(), word

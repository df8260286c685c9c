"""A LoRA YAML becomes SPFT by two lines: `plugins:` and `adapter:`.

Invariants: r = 2 x lora_r neurons in exactly the layers that the LoRA keys name, the keys without a
meaning are named in one warning, and LoRA itself is the same with our plugin loaded.
"""

from __future__ import annotations

import json

import pytest
import torch
from axolotl_runs import layers_of, lora_yaml, same_tensors, spft_yaml, train
from safetensors.torch import load_file

TWO_LINES = {"plugins": ["axolotl_spft.SPFTPlugin"], "adapter": "prune_spft"}
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
MLP = ("gate_proj", "up_proj", "down_proj")


def _names(layers, blocks=(0, 1)) -> set[str]:
    return {
        f"model.layers.{b}.{'mlp' if n in MLP else 'self_attn'}.{n}" for b in blocks for n in layers
    }


def test_two_lines_turn_a_lora_yaml_into_spft(assets, tmp_path, caplog):
    lora = lora_yaml(assets)
    run = train({**lora, **TWO_LINES}, tmp_path / "out")

    layers = layers_of(run.tensors)
    assert layers.keys() == _names((*ATTENTION, *MLP))
    assert {tuple(layer["index"].shape) for layer in layers.values()} == {(2 * lora["lora_r"],)}
    assert json.loads((run.out / "adapter_config.json").read_text())["peft_type"] == "SPFT"
    assert all(bool(layer["weight"].any()) for layer in layers.values()), "nothing was trained"
    assert run.losses[-1] < run.losses[0]

    warnings = [r.getMessage() for r in caplog.records if r.name.startswith("axolotl_spft")]
    assert warnings == ["adapter: prune_spft does not use lora_alpha, lora_dropout"]


@pytest.mark.parametrize(
    ("keys", "expected"),
    [
        ({"lora_target_modules": ["q_proj", "down_proj"]}, _names(["q_proj", "down_proj"])),
        ({"lora_target_modules": r".*\.1\.mlp\.up_proj"}, _names(["up_proj"], blocks=[1])),
        (
            {"lora_target_modules": ["q_proj"], "peft_layers_to_transform": [1]},
            _names(["q_proj"], blocks=[1]),
        ),
        (
            {"lora_target_linear": True, "peft_layers_to_transform": [0]},
            _names((*ATTENTION, *MLP), blocks=[0]),
        ),
        (
            {"lora_target_linear": True, "lora_target_modules": ["q_proj"]},
            _names((*ATTENTION, *MLP)),
        ),
        (
            {"spft_target_modules": ["v_proj"], "lora_target_modules": ["q_proj"]},
            _names(["v_proj"]),
        ),
        ({"spft_exclude_modules": list(ATTENTION)}, _names(MLP)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_target_keys_keep_their_meaning(assets, tmp_path, keys, expected):
    config = lora_yaml(assets, **{"lora_target_linear": None, **TWO_LINES, **keys}, max_steps=1)
    layers = layers_of(train(config, tmp_path / "out").tensors)
    assert layers.keys() == expected
    assert {layer["index"].numel() for layer in layers.values()} == {8}


@pytest.mark.parametrize(
    ("keys", "neurons_of_32", "neurons_of_48"),
    [({"spft_r": 3}, 3, 3), ({"spft_density": 0.25}, 8, 12)],
)
def test_spft_keys_come_before_lora_r(assets, tmp_path, keys, neurons_of_32, neurons_of_48):
    config = lora_yaml(assets, **{**TWO_LINES, "max_steps": 1, **keys})
    layers = layers_of(train(config, tmp_path / "out").tensors)
    assert layers["model.layers.0.self_attn.q_proj"]["index"].numel() == neurons_of_32
    assert layers["model.layers.0.mlp.up_proj"]["index"].numel() == neurons_of_48


def test_modules_to_save_are_trained_whole(assets, tmp_path):
    config = lora_yaml(assets, **TWO_LINES, lora_modules_to_save=["model.norm"])
    tensors = train(config, tmp_path / "out").tensors
    norm = tensors.pop("base_model.model.model.norm.weight")
    assert all(".spft_delta." in name for name in tensors)
    assert not torch.equal(norm, assets.base_model().model.norm.weight)


def test_lora_trains_the_same_with_our_plugin_loaded(assets, tmp_path):
    torch.manual_seed(0)  # LoRA's A is drawn before the trainer seeds
    alone = train(lora_yaml(assets), tmp_path / "alone")
    torch.manual_seed(0)
    beside = train(lora_yaml(assets, plugins=TWO_LINES["plugins"]), tmp_path / "beside")
    assert same_tensors(alone.tensors, beside.tensors)
    assert any("lora_A" in name for name in alone.tensors)
    assert not list(beside.out.glob("spft_*"))


def test_full_training_is_the_same_with_our_plugin_loaded(assets, tmp_path):
    keys = {"adapter": None, "spft_r": None, "spft_calibration_batches": None}
    alone = train(spft_yaml(assets, **keys, plugins=None), tmp_path / "alone")
    beside = train(spft_yaml(assets, **keys), tmp_path / "beside")
    weights = [load_file(run.out / "model.safetensors") for run in (alone, beside)]
    assert same_tensors(*weights)
    assert not same_tensors(weights[0], load_file(assets.model / "model.safetensors"))

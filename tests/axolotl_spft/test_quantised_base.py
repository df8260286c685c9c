"""`load_in_4bit` and `load_in_8bit` with `adapter: prune_spft`.

Invariants: the base is to the bit, in every dtype and setting, what Axolotl loads for qlora (4
bits) and lora (8 bits); the trained neurons start from the checkpoint's own rows, so that a merge
into it changes these alone, to anchor + delta; a resumed run ends with the same bits; DPO's first
loss is that of equal policy and reference.
"""

from __future__ import annotations

import math
import shutil
import sys
from unittest import mock

import pytest
import torch
from axolotl_runs import (
    adapter_tensors,
    call,
    layers_of,
    lora_yaml,
    own_process_state,
    preference_yaml,
    quantised_yaml,
    same_tensors,
    train,
    with_delta,
    write_yaml,
)
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from peft import PeftModel
from quantised import quantised
from safetensors.torch import load_file

from trainer_ext import SpftError

BITS = (4, 8)
LONG = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}


def _load(config: dict, out):
    """The model as `axolotl train` gives it to its trainer."""
    from axolotl.cli.config import load_cfg
    from axolotl.cli.utils import load_model_and_tokenizer

    with own_process_state(), mock.patch.object(sys, "argv", ["axolotl"]):
        return load_model_and_tokenizer(cfg=load_cfg(str(write_yaml(config, out))))[0]


def _base_bits(model) -> dict[str, torch.Tensor]:
    """The bytes of everything that is not the adapter's; packed weights may look like NaNs."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {
        f"{name} {tensor.dtype}": tensor.data.contiguous().view(-1).view(torch.uint8)
        for name, tensor in tensors.items()
        if "spft_" not in name and "lora_" not in name
    }


def _settings(model) -> dict[str, tuple]:
    """What a quantised layer's class, quantisation and computation are, by layer name."""
    found = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, Linear4bit):
            state = weight.quant_state
            found[name] = (state.quant_type, state.nested, state.dtype, module.compute_dtype)
            found[name] += (weight.quant_storage, weight.blocksize)
        elif isinstance(module, Linear8bitLt):
            found[name] = (weight.SCB.tolist(), module.state.threshold)
    return found


@pytest.mark.parametrize(
    ("bits", "changes"),
    [
        (4, {}),
        (4, {"bf16": False}),
        (4, {"bnb_config_kwargs": {"bnb_4bit_use_double_quant": False, "bnb_4bit_blocksize": 128}}),
        (8, {}),
    ],
)
def test_the_base_is_what_axolotl_loads_for_lora(assets, tmp_path, bits, changes):
    shared = {"base_model": str(assets.model_wide), f"load_in_{bits}bit": True, "bf16": True}
    shared |= {"gradient_checkpointing": True, **changes}
    lora = _load(
        lora_yaml(assets, **shared, adapter="qlora" if bits == 4 else "lora"), tmp_path / "lora"
    )
    spft = _load(quantised_yaml(assets, bits, **shared), tmp_path / "spft")
    assert len(_settings(spft)) == 14
    assert _settings(spft) == _settings(lora)
    assert same_tensors(_base_bits(spft), _base_bits(lora))
    for name, parameter in spft.named_parameters():
        assert parameter.requires_grad == ("spft_delta" in name)
    for model in (spft, lora):
        base = model.get_base_model()
        assert base.is_gradient_checkpointing
        embedded = base.get_input_embeddings()(torch.zeros(1, 1, dtype=torch.int64))
        assert embedded.requires_grad


@pytest.fixture(scope="module")
def runs(assets, tmp_path_factory):
    """bits -> a run over that base."""
    made = {}
    for bits in BITS:
        with own_process_state():
            out = tmp_path_factory.mktemp(f"{bits}bit") / "out"
            made[bits] = train(quantised_yaml(assets, bits, **LONG), out)
    return made


@pytest.mark.parametrize("bits", BITS)
def test_neurons_start_from_the_original_rows(assets, runs, bits):
    original = load_file(assets.model_wide / "model.safetensors")
    layers = layers_of(runs[bits].tensors)
    assert len(layers) == 14
    for name, layer in layers.items():
        assert layer["weight"].any(), f"{name} has not moved"
        rows = original[f"{name}.weight"][layer["index"]]
        assert layer["anchor"].dtype == torch.bfloat16
        assert torch.equal(layer["anchor"], rows)
    losses = runs[bits].losses
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("bits", BITS)
def test_resumed_run_ends_with_the_same_bits(assets, runs, tmp_path, bits):
    out = tmp_path / "out"
    train(quantised_yaml(assets, bits, **{**LONG, "max_steps": 2}), out)
    config = quantised_yaml(assets, bits, **LONG, auto_resume_from_checkpoints=True)
    resumed = train(config, out)
    assert resumed.calibration == []
    assert len(resumed.batches) == 2
    assert resumed.losses == runs[bits].losses
    assert same_tensors(resumed.tensors, runs[bits].tensors)
    assert not same_tensors(resumed.tensors, adapter_tensors(out / "checkpoint-2"))


@pytest.mark.parametrize("bits", BITS)
def test_the_adapter_loads_over_the_quantised_base(assets, runs, bits):
    base = quantised(assets.model_wide, bits, torch.bfloat16)
    loaded = PeftModel.from_pretrained(base, runs[bits].out)
    state = loaded.state_dict()
    for name, tensor in runs[bits].tensors.items():
        name = name.replace(".spft_delta.", ".spft_delta.default.")
        assert torch.equal(state[name], tensor)
    with pytest.raises(SpftError, match="merge into the original checkpoint"):
        loaded.merge_and_unload()


@pytest.mark.parametrize("bits", BITS)
def test_merge_lora_is_the_original_checkpoint_with_the_rows(assets, runs, bits):
    from axolotl.cli.merge_lora import do_cli

    out = runs[bits].out
    with own_process_state():
        call(do_cli, quantised_yaml(assets, bits, spft_quant_init="exact"), out)
    merged = load_file(out / "merged" / "model.safetensors")
    assert same_tensors(merged, with_delta(assets, out, assets.model_wide))


def test_quant_init_none_starts_from_the_quantised_rows(assets, tmp_path):
    run = train(quantised_yaml(assets, 4, spft_quant_init="none"), tmp_path / "out")
    layers = layers_of(run.tensors)
    assert all(layer.keys() == {"weight", "index", "selected"} for layer in layers.values())
    assert all(layer["weight"].any() for layer in layers.values())


@pytest.mark.parametrize("bits", BITS)
def test_dpo_over_a_quantised_base(assets, tmp_path, bits):
    pairs = {key: preference_yaml(assets, "dpo")[key] for key in ("rl", "datasets")}
    run = train({**quantised_yaml(assets, bits), **pairs}, tmp_path / "out")
    assert run.losses[0] == pytest.approx(math.log(2), rel=1e-6)
    assert run.losses[1] != run.losses[0]
    assert all("anchor" in layer for layer in layers_of(run.tensors).values())
    assert not list(run.out.glob("model*")), "frozen weights were saved"


def test_training_goes_on_from_an_adapter_over_a_quantised_base(assets, runs, tmp_path):
    config = quantised_yaml(assets, 4, spft_r=None, lora_model_dir=str(runs[4].out))
    more = train(config, tmp_path / "out")
    assert more.calibration == []
    before = layers_of(runs[4].tensors)
    for name, layer in layers_of(more.tensors).items():
        assert torch.equal(layer["anchor"], before[name]["anchor"])
        assert torch.equal(layer["index"], before[name]["index"])
        assert not torch.equal(layer["weight"], before[name]["weight"])


def test_a_checkpoint_without_original_rows_is_told_in_one_line(assets, tmp_path):
    source = tmp_path / "model"
    shutil.copytree(assets.model_wide, source)
    (source / "model.safetensors").unlink()
    torch.save(load_file(assets.model_wide / "model.safetensors"), source / "pytorch_model.bin")
    with pytest.raises(SpftError) as caught:
        train(quantised_yaml(assets, 4, base_model=str(source)), tmp_path / "out")
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith("spft_quant_init is 'exact' (the default of a quantised base), but")
    assert "has no safetensors file" in message
    assert "set spft_quant_init to 'none'" in message

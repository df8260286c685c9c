"""Rows of a checkpoint are read bit for bit, whatever its shards and prefixes; memory is bounded by
the rows that are read, not by the tensors that they are in; what is no original checkpoint is told
in one line."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch
from peft import get_peft_model
from quantised import quantised, save_base
from safetensors.torch import load_file, save_file

from trainer_ext import SpftConfig, SpftError, select_neurons
from trainer_ext.files.base_checkpoint import BaseCheckpoint

LAYER = "model.layers.1.mlp.down_proj"
INDEX = torch.tensor([3, 4, 40])


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


def tensors_of(folder) -> dict[str, torch.Tensor]:
    return {k: t for file in folder.glob("*.safetensors") for k, t in load_file(file).items()}


@pytest.mark.parametrize("shards", [1, 3])
def test_rows_are_the_checkpoints(tmp_path, shards):
    size = {} if shards == 1 else {"max_shard_size": "80KB"}
    folder = save_base(tmp_path / "base", **size)
    assert (len(list(folder.glob("*.safetensors"))) > 1) == (shards > 1)
    rows = BaseCheckpoint.find(str(folder)).rows(LAYER, INDEX)
    assert rows.dtype == torch.bfloat16
    assert torch.equal(rows, tensors_of(folder)[f"{LAYER}.weight"][INDEX])


def test_columns_are_the_neurons_of_conv1d(tmp_path):
    folder = save_base(tmp_path / "base", "gpt2")
    rows = BaseCheckpoint.find(str(folder)).rows("transformer.h.0.mlp.c_fc", INDEX, columns=True)
    weight = tensors_of(folder)["transformer.h.0.mlp.c_fc.weight"]
    assert torch.equal(rows, weight[:, INDEX].t())


def test_of_a_single_file_and_shards_the_single_file_counts(base, tmp_path):
    """As transformers reads such a folder."""
    tensors = tensors_of(base)
    save_file(tensors, tmp_path / "model.safetensors")
    stale = {name: tensor + 1 for name, tensor in tensors.items()}
    save_file(stale, tmp_path / "model-00001-of-00001.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    rows = BaseCheckpoint.find(str(tmp_path)).rows(LAYER, INDEX)
    assert torch.equal(rows, tensors[f"{LAYER}.weight"][INDEX])


@pytest.mark.parametrize("strip", [True, False], ids=["without prefix", "with more"])
def test_a_prefix_may_differ_on_either_side(base, tmp_path, strip):
    tensors = tensors_of(base)
    renamed = {k.removeprefix("model.") if strip else f"more.{k}": t for k, t in tensors.items()}
    save_file(renamed, tmp_path / "model.safetensors")
    rows = BaseCheckpoint.find(str(tmp_path)).rows(LAYER, INDEX)
    assert torch.equal(rows, tensors[f"{LAYER}.weight"][INDEX])


_MEASURE = """
import re, sys, torch
from pathlib import Path
from trainer_ext.files.base_checkpoint import BaseCheckpoint

def peak():
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

checkpoint = BaseCheckpoint.find(sys.argv[1])
index = torch.arange(0, 8192, 128)
checkpoint.rows("small", torch.arange(4))  # what is loaded once
Path("/proc/self/clear_refs").write_text("5")  # the peak is what there is now
before = peak()
rows = checkpoint.rows("large", index)
print(peak() - before, rows.numel() * rows.element_size())
"""


def test_memory_is_bounded_by_the_rows_that_are_read(tmp_path):
    """Of a tensor of 128 MiB, 64 rows of 16 KiB: 1 MiB, once as pages of the file, once copied, and
    once put together. A mapped file's neighbouring pages come along, 64 KiB at a time."""
    large = torch.zeros(8192, 8192, dtype=torch.bfloat16)
    tensors = {"large.weight": large, "small.weight": torch.zeros(8, 8, dtype=torch.bfloat16)}
    save_file(tensors, tmp_path / "model.safetensors")
    del large, tensors
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, str(tmp_path)], capture_output=True, text=True, check=True
    )
    grown, read = map(int, done.stdout.split())
    print(f"peak memory grew by {grown} bytes for {read}")
    assert read == 2**20
    assert read / 2 < grown <= 3 * read + 64 * 2**17 < 128 * 2**20 / 10


def find(folder):
    return BaseCheckpoint.find(str(folder))


def test_what_is_no_original_checkpoint_is_told(base, tmp_path):
    with pytest.raises(SpftError, match="does not say which checkpoint"):
        find("")
    with pytest.raises(SpftError, match=r"'no/such-model' was not found on this disk"):
        find("no/such-model")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytest_model.bin").write_bytes(b"")
    with pytest.raises(SpftError, match=r"has no safetensors file .*; convert it"):
        find(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not whole")
    with pytest.raises(SpftError, match="is not a whole safetensors file"):
        find(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    index = {"weight_map": {f"{LAYER}.weight": "model-00001-of-00002.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(SpftError, match=r"lacks model-00001-of-00002\.safetensors"):
        find(tmp_path)


def test_a_checkpoint_of_another_model_is_told(base, tmp_path):
    checkpoint = find(base)
    with pytest.raises(SpftError, match=r"has no tensors that could be model\.layers\.7"):
        checkpoint.rows("model.layers.7.mlp.down_proj", INDEX)
    with pytest.raises(SpftError, match="has no neuron 64; it is the checkpoint of another"):
        checkpoint.rows(LAYER, torch.tensor([64]))
    tensors = {f"{LAYER}.weight": torch.zeros(64, 128, dtype=torch.uint8)}
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(SpftError, match="as U8, so it is quantised itself"):
        find(tmp_path).rows(LAYER, INDEX)


@pytest.fixture
def without_rows(tmp_path):
    """A quantised model whose checkpoint the test can spoil."""
    return quantised(save_base(tmp_path / "base"), 4), tmp_path / "base"


@pytest.mark.parametrize("moment", ["before", "after"], ids=["put in", "selected"])
def test_a_missing_checkpoint_is_told_before_anything_is_changed(without_rows, moment):
    model, folder = without_rows
    config = SpftConfig(r=4, importance="magnitude")
    if moment == "after":
        model = get_peft_model(model, config)
    (folder / "model.safetensors").rename(folder / "model.bin")
    with pytest.raises(SpftError) as told:
        select_neurons(model) if moment == "after" else get_peft_model(model, config)
    assert "no safetensors file" in str(told.value)
    assert "set quant_init to 'none'" in str(told.value)
    assert "\n" not in str(told.value)
    if moment == "after":
        assert not any(b.any() for n, b in model.named_buffers() if n.endswith("selected"))


def test_rows_of_other_weights_are_refused(without_rows):
    model, folder = without_rows
    model = get_peft_model(model, SpftConfig(r=4, importance="magnitude"))
    tensors = tensors_of(folder)
    torch.manual_seed(5)
    save_file(
        {name: torch.randn_like(t) for name, t in tensors.items()}, folder / "model.safetensors"
    )
    with pytest.raises(SpftError, match="are not those that this model was quantised from"):
        select_neurons(model)


def test_a_model_made_from_nothing_has_no_original_rows(without_rows):
    model, _ = without_rows
    model.name_or_path = ""
    with pytest.raises(SpftError, match="does not say which checkpoint it was loaded from"):
        get_peft_model(model, SpftConfig(r=4))


def test_an_option_of_quantised_bases_on_a_dense_one_is_refused(without_rows):
    from quantised import dense

    _, folder = without_rows
    for value in ("exact", "none"):
        with pytest.raises(SpftError, match="targeted layers are not quantised; drop it"):
            get_peft_model(dense(folder), SpftConfig(r=4, quant_init=value))
    with pytest.raises(SpftError, match="quant_init is 'all'; allowed: exact, none"):
        SpftConfig(r=4, quant_init="all")


def test_writing_through_quantised_weights_is_refused(without_rows):
    with pytest.raises(SpftError, match="base weights are in 4 bits, which cannot hold an update"):
        get_peft_model(without_rows[0], SpftConfig(r=4, forward="write_through"))

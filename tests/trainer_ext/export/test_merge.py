"""A merged checkpoint is the base's, byte for byte, but for the trained rows, which hold W + delta
or anchor + delta rounded to their dtype: what PEFT's merge of the loaded model gives. Nothing is
left of a merge that fails."""

from __future__ import annotations

import hashlib

import pytest
import torch
from adapters import fill_deltas
from peft import LoraConfig, PeftModel, get_peft_model
from quantised import dense, save_base
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from trainer_ext import SpftConfig, SpftError, merge_checkpoint, select_neurons
from trainer_ext.tuner.model import spft_layers

CONFIG = {"r": 4, "importance": "magnitude"}


def save_adapter(base, folder, **config):
    model = get_peft_model(dense(base, torch.bfloat16), SpftConfig(**CONFIG, **config))
    select_neurons(model)
    fill_deltas(model)
    model.save_pretrained(folder)
    return model


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def base(request, tmp_path_factory):
    folder = save_base(
        tmp_path_factory.mktemp(request.param) / "base", request.param, max_shard_size="80KB"
    )
    (folder / "tokenizer.json").write_text("{}")
    (folder / "pytorch_model.bin").write_bytes(b"the base's weights in another form")
    return folder


@pytest.fixture(scope="module")
def adapter(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    return save_adapter(base, folder), folder


def test_it_is_what_peft_merges(base, adapter, tmp_path):
    merge_checkpoint(adapter[1], tmp_path / "merged")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.bfloat16)
    by_peft = PeftModel.from_pretrained(dense(base, torch.bfloat16), adapter[1]).merge_and_unload()
    theirs = by_peft.state_dict()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in model.state_dict().items())


def test_every_other_byte_is_the_bases(base, adapter, tmp_path):
    merge_checkpoint(adapter[1], tmp_path / "merged", base=base)
    here = {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()}
    there = {path.name: path.read_bytes() for path in base.iterdir()}
    assert there.keys() - here.keys() == {"pytorch_model.bin"}
    assert not here.keys() - there.keys()
    rows = sum(d.numel() for n, d in adapter[0].named_parameters() if ".spft_delta." in n)
    changed = 0
    for name, content in here.items():
        assert len(content) == len(there[name])
        if name.endswith(".safetensors"):
            pairs = zip(content, there[name], strict=True)
            changed += sum(a != b for a, b in pairs)
        else:
            assert content == there[name], name
    assert 0 < changed <= 2 * rows


def test_an_adapter_that_started_from_another_merges_to_its_anchor_plus_delta(
    base, adapter, tmp_path
):
    second = get_peft_model(dense(base, torch.bfloat16), SpftConfig(start_adapter=str(adapter[1])))
    fill_deltas(second, scale=0.3)
    second.save_pretrained(tmp_path / "second")
    merge_checkpoint(tmp_path / "second", tmp_path / "merged")
    merged = dense(tmp_path / "merged", torch.bfloat16)
    first = dense(base, torch.bfloat16)
    for name, layer in spft_layers(adapter[0]).items():
        start, last = layer.spft_delta["default"], spft_layers(second)[name].spft_delta["default"]
        rows = layer.rows(start.index)
        anchor = (rows + start.weight.detach()).to(torch.bfloat16)
        expected = (anchor + last.weight.detach()).to(torch.bfloat16)
        weight = merged.get_submodule(name).weight
        weight = weight.t() if layer.is_conv1d else weight
        assert torch.equal(weight[start.index], expected), name
    assert torch.equal(first.lm_head.weight, merged.lm_head.weight)


def test_modules_trained_whole_are_merged_too(base, tmp_path):
    if "gpt2" in str(base):
        pytest.skip("one architecture is enough")
    model = save_adapter(base, tmp_path / "adapter", modules_to_save=["lm_head"])
    with torch.no_grad():
        model.get_output_embeddings().weight.add_(1.0)
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "adapter", tmp_path / "merged")
    head = dense(tmp_path / "merged", torch.bfloat16).lm_head.weight
    assert torch.equal(head, model.get_output_embeddings().weight.to(torch.bfloat16))
    assert not torch.equal(head, dense(base, torch.bfloat16).lm_head.weight)


@pytest.mark.parametrize(
    ("module", "line"),
    [("embed_tokens", "it is the head's weight too"), ("lm_head", "no tensor of that name")],
)
def test_one_of_two_tied_modules_trained_whole_is_refused(tmp_path, module, line):
    """The checkpoint has one tensor for both, and the other one was not trained."""
    folder = save_base(tmp_path / "base", tie_word_embeddings=True)
    save_adapter(folder, tmp_path / "adapter", modules_to_save=[module])
    with pytest.raises(SpftError, match=f"was trained whole.*{line}.*merge_and_unload"):
        merge_checkpoint(tmp_path / "adapter", tmp_path / "merged")


def digest(folder) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_mistakes_are_told_and_leave_nothing(base, adapter, tmp_path):
    before = digest(base)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    get_peft_model(dense(base), LoraConfig(r=2, target_modules="all-linear")).save_pretrained(
        tmp_path / "lora"
    )
    get_peft_model(dense(base), SpftConfig(**CONFIG)).save_pretrained(tmp_path / "fresh")
    broken = tmp_path / "broken"
    adapter[0].save_pretrained(broken)
    tensors = load_file(broken / "adapter_model.safetensors")
    name = sorted(n for n in tensors if n.endswith(".weight"))[-1]
    tensors[name] = tensors[name] * torch.inf
    save_file(tensors, broken / "adapter_model.safetensors")
    cut, lacking = tmp_path / "cut", tmp_path / "lacking"
    for folder in (cut, lacking):
        adapter[0].save_pretrained(folder)
    content = (cut / "adapter_model.safetensors").read_bytes()
    (cut / "adapter_model.safetensors").write_bytes(content[: len(content) // 2])
    kept = load_file(lacking / "adapter_model.safetensors")
    kept.pop(next(n for n in kept if n.endswith(".selected")))
    save_file(kept, lacking / "adapter_model.safetensors")
    for folder, output, source, line in (
        (adapter[1], "full", None, "exists; name a new folder"),
        (tmp_path / "none", "out", None, "was not found, or has no whole adapter_config.json"),
        (tmp_path / "lora", "out", None, "is a LORA adapter; give one of SPFT"),
        (tmp_path / "fresh", "out", None, "has never been trained"),
        (cut, "out", None, "or has no whole adapter_model.safetensors"),
        (lacking, "out", None, "lacks selected of"),
        (adapter[1], "full/file/out", None, "cannot be made: "),
        (broken, "out", None, "has non-finite values for"),
        (adapter[1], "out", tmp_path / "nowhere", "nowhere' was not found on this disk"),
        (adapter[1], "out", tmp_path / "full", "was not found on this disk"),
    ):
        with pytest.raises(SpftError) as told:
            merge_checkpoint(folder, tmp_path / output, base=source)
        assert line in str(told.value)
        assert "\n" not in str(told.value)
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))
    assert digest(base) == before


def test_a_checkpoint_of_another_size_is_told(base, adapter, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for file in base.iterdir():
        if file.suffix == ".safetensors":
            tensors = load_file(file)
            narrow = {n: t[:, :3].contiguous() if t.ndim == 2 else t for n, t in tensors.items()}
            save_file(narrow, other / file.name)
        else:
            (other / file.name).write_bytes(file.read_bytes())
    with pytest.raises(SpftError, match="which does not fit the adapter's neurons"):
        merge_checkpoint(adapter[1], tmp_path / "out", base=other)
    assert not (tmp_path / "out").exists()

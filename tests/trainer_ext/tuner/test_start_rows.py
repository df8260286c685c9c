"""An adapter that starts from another one (`start_adapter`) computes what that one computes until
it is trained, comes back to it when it is switched off, and merges to its rows + delta. In fp32 bit
for bit where the same products are computed, else to 1e-5 (unit roundoff 2^-24, 32 to 48 products
a sum)."""

from __future__ import annotations

import pytest
import torch
from adapters import fill_deltas, trained, wrapped
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny_models import batch, tiny_model

from trainer_ext import (
    SelectedNeuronAdamW,
    SpftConfig,
    SpftError,
    apply_selection,
    current_selection,
    restore_base,
    select_neurons,
    trained_parameters,
    write_through,
)
from trainer_ext.tuner.model import spft_layers

ARCHITECTURES = ("llama", "llama_bias", "gpt2")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def sft(request, tmp_path_factory):
    """Architecture, folder of a trained adapter, and the logits of its merged model."""
    folder = tmp_path_factory.mktemp(request.param)
    trained(request.param).save_pretrained(folder)
    merged = PeftModel.from_pretrained(tiny_model(request.param), folder).merge_and_unload()
    return request.param, folder, merged.eval()(**batch()).logits


def started(architecture, folder, **config):
    config = SpftConfig(start_adapter=str(folder), **config)
    return get_peft_model(tiny_model(architecture), config)


def steps(model, count=3):
    optimizer = SelectedNeuronAdamW(trained_parameters(model), lr=1e-2)
    model.train()
    for number in range(count):
        model(**batch(number)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def test_it_brings_its_neurons_and_starts_as_the_merged_model(sft):
    architecture, folder, logits = sft
    model = started(architecture, folder).eval()
    theirs = current_selection(PeftModel.from_pretrained(tiny_model(architecture), folder))
    ours = current_selection(model)
    assert all(torch.equal(ours.index[name], index) for name, index in theirs.index.items())
    torch.testing.assert_close(model(**batch()).logits, logits, rtol=1e-5, atol=1e-5)
    assert all(not p.any() for p in trained_parameters(model))


@pytest.mark.parametrize("forward", ["auto", "delta"])
def test_switched_off_it_is_where_it_started(sft, forward):
    architecture, folder, logits = sft
    model = started(architecture, folder, forward=forward)
    steps(model)
    layers = spft_layers(model).values()
    assert all((layer.written is not None) == (forward == "auto") for layer in layers)
    model.eval()
    trained = model(**batch()).logits
    assert (trained - logits).abs().max() > 0.1
    with model.disable_adapter():
        off = model(**batch()).logits
    torch.testing.assert_close(off, logits, rtol=1e-5, atol=1e-5)
    # in the middle of a loss, and put back afterwards
    assert torch.equal(model(**batch()).logits, trained)
    base = tiny_model(architecture).state_dict()
    restore_base(model)
    for name, tensor in model.get_base_model().state_dict().items():
        assert ".spft_delta." in name or torch.equal(base[name.replace("base_layer.", "")], tensor)
    torch.testing.assert_close(model(**batch()).logits, trained, rtol=1e-5, atol=1e-5)


def test_both_forward_paths_train_the_same(sft):
    architecture, folder, _ = sft
    ends = []
    for forward in ("write_through", "delta"):
        model = started(architecture, folder, forward=forward)
        write_through(model)
        steps(model)
        ends.append(torch.cat([p.detach().flatten() for p in trained_parameters(model)]))
    assert (ends[0] - ends[1]).norm() <= 1e-3 * ends[1].norm()


def test_merged_saved_and_loaded(sft, tmp_path):
    architecture, folder, _ = sft
    model = started(architecture, folder)
    steps(model)
    restore_base(model)
    model.eval()
    logits = model(**batch()).logits
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(architecture), tmp_path).eval()
    assert torch.equal(loaded(**batch()).logits, logits)
    layers = spft_layers(loaded)
    expected = {}
    for name, layer in layers.items():
        delta = layer.spft_delta["default"]
        weight = layer.get_base_layer().weight.detach().clone()
        weight = weight.t() if layer.is_conv1d else weight
        weight[delta.index] = delta.anchor + delta.weight.detach()
        expected[name] = weight
        change = layer.get_delta_weight("default")
        change = change.t() if layer.is_conv1d else change
        torch.testing.assert_close(layer.rows(torch.arange(layer.out_features)) + change, weight)
    merged = loaded.merge_and_unload()
    for name, weight in expected.items():
        here = merged.get_submodule(name).weight
        assert torch.equal(here.t() if layers[name].is_conv1d else here, weight), name
    torch.testing.assert_close(merged(**batch()).logits, logits, rtol=1e-5, atol=1e-5)


def test_beside_another_adapter_it_merges_as_it_computes(sft):
    architecture, folder, _ = sft
    model = started(architecture, folder)
    fill_deltas(model)
    model.add_adapter("aa", SpftConfig(r=6, importance="magnitude"))
    model.set_adapter("aa")
    select_neurons(model, adapter_name="aa")
    fill_deltas(model, "aa")
    model.base_model.set_adapter(["aa", "default"])
    logits = model.eval()(**batch()).logits
    model.merge_adapter(["aa", "default"])
    torch.testing.assert_close(model(**batch()).logits, logits, rtol=1e-5, atol=1e-4)
    layer = next(iter(spft_layers(model).values()))
    change = layer.get_delta_weight("default")
    model.unmerge_adapter()
    assert torch.equal(layer.get_delta_weight("default"), change)
    model.merge_adapter(["aa"])
    with pytest.raises(SpftError, match="merge 'default' first"):
        model.merge_adapter(["default"])


def test_a_configuration_used_again_starts_anew(sft):
    architecture, folder, logits = sft
    config = SpftConfig(start_adapter=str(folder))
    for _ in range(2):
        model = get_peft_model(tiny_model(architecture), config).eval()
        torch.testing.assert_close(model(**batch()).logits, logits, rtol=1e-5, atol=1e-5)


def test_a_file_without_its_anchors_is_refused(sft, tmp_path):
    architecture, folder, _ = sft
    started(architecture, folder).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("anchor")}
    save_file(kept, tmp_path / "adapter_model.safetensors")
    with pytest.raises(SpftError, match="without which its neurons start from nothing"):
        PeftModel.from_pretrained(tiny_model(architecture), tmp_path)


def test_a_compiled_graph_computes_the_same(sft):
    architecture, folder, _ = sft
    model = started(architecture, folder, forward="delta")
    steps(model)
    layer = next(iter(spft_layers(model).values()))
    x = torch.randn(2, 3, layer.in_features)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    with model.disable_adapter():
        torch.testing.assert_close(compiled(x), layer(x))


def test_a_copy_for_reference_starts_where_this_one_did(sft):
    """TRL makes its reference this way: the same configuration, then copies of the parameters."""
    architecture, folder, logits = sft
    model = started(architecture, folder)
    model.add_adapter("ref", model.peft_config["default"])
    steps(model)
    model.set_adapter("ref")
    torch.testing.assert_close(model.eval()(**batch()).logits, logits, rtol=1e-5, atol=1e-5)


def test_two_anchored_adapters_at_once_are_refused(sft):
    architecture, folder, _ = sft
    model = started(architecture, folder)
    model.add_adapter("other", model.peft_config["default"])
    model.base_model.set_adapter(["default", "other"])
    with pytest.raises(SpftError, match="'default', 'other' are active together"):
        model(**batch())


def test_its_neurons_are_fixed(sft):
    architecture, folder, _ = sft
    model = started(architecture, folder)
    with pytest.raises(SpftError, match="goes on with the neurons of start_adapter"):
        apply_selection(model, current_selection(model))


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ({"r": 5}, "r is 5 but the adapter in start_adapter .* was made with 4; drop r"),
        ({"density": 0.25}, "density is 0.25 but .* made with None"),
        ({"target_modules": ["q_proj"]}, r"target_modules is \['q_proj'\] but the adapter"),
        ({"quant_init": "none"}, "quant_init is 'none' but the targeted layers are not quantised"),
        ({"modules_to_save": ["lm_head"]}, "cannot be switched back to where they started"),
    ],
)
def test_what_contradicts_it_is_refused(sft, config, line):
    architecture, folder, _ = sft
    with pytest.raises(SpftError, match=line):
        started(architecture, folder, **config)


def test_a_folder_without_a_trained_spft_adapter_is_refused(tmp_path):
    with pytest.raises(
        SpftError, match=r"start_adapter: the adapter .*has no whole adapter_config\.json"
    ):
        started("llama", tmp_path / "nothing")
    wrapped().save_pretrained(tmp_path / "fresh")
    with pytest.raises(SpftError, match="has never been trained"):
        started("llama", tmp_path / "fresh")
    (tmp_path / "fresh" / "adapter_model.safetensors").unlink()
    with pytest.raises(SpftError, match=r"has no whole adapter_model\.safetensors"):
        started("llama", tmp_path / "fresh")
    from peft import LoraConfig

    get_peft_model(tiny_model(), LoraConfig(r=2)).save_pretrained(tmp_path / "lora")
    with pytest.raises(SpftError, match="is a LORA adapter; give one of SPFT"):
        started("llama", tmp_path / "lora")

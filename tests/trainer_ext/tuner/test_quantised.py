"""Over a 4- or 8-bit base the selected neurons start from the checkpoint's original rows, bit for
bit, and everything else is the quantised layer's: outputs, gradients, "adapter off", saving.

References: plain linear layers and plain autograd on the dequantised weights with the original rows
put in. In fp32 (unit roundoff 2^-24) with 64 to 128 products a sum, results agree to 1e-5."""

from __future__ import annotations

import pytest
import torch
from adapters import fill_deltas
from peft import PeftModel, get_peft_model, prepare_model_for_kbit_training
from quantised import BITS, dense, quantised, save_base
from safetensors.torch import load_file
from tiny_models import batch
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from transformers.pytorch_utils import Conv1D

from trainer_ext import SpftConfig, SpftError, merge_checkpoint, select_neurons
from trainer_ext.tuner.base_layers import dense_weight
from trainer_ext.tuner.model import spft_layers

ARCHITECTURES = ("llama", "llama_bias", "gpt2")
METRICS = ("group_taylor", "taylor", "zo_taylor", "wanda", "magnitude", "random")


@pytest.fixture(scope="module", params=ARCHITECTURES)
def base(request, tmp_path_factory):
    return save_base(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("llama"))


@pytest.fixture(params=BITS, ids=lambda bits: f"{bits}bit")
def bits(request):
    return request.param


def selected(folder, bits, dtype=torch.float32, **config):
    """A fresh adapter over the quantised checkpoint, its neurons selected."""
    config = {"r": 4, "importance": "magnitude", **config}
    model = get_peft_model(quantised(folder, bits, dtype), SpftConfig(**config))
    select_neurons(model)
    return model


def original(folder) -> dict[str, tuple[torch.Tensor, torch.Tensor | None]]:
    """Layer name -> its weight in the checkpoint (d_out, d_in) and bias."""
    found = {}
    for name, layer in dense(folder, torch.bfloat16).named_modules():
        if isinstance(layer, (torch.nn.Linear, Conv1D)):
            weight = layer.weight.t() if isinstance(layer, Conv1D) else layer.weight
            found[name] = weight.detach(), layer.bias
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_step_0_has_the_original_rows_bit_for_bit(base, bits, dtype):
    model = selected(base, bits, dtype).train()
    untouched = quantised(base, bits, dtype).train()
    weights = original(base)
    for name, layer in spft_layers(model).items():
        x = torch.randn(2, 5, layer.in_features, dtype=dtype)
        index = layer.spft_delta["default"].index
        others = torch.ones(layer.out_features, dtype=torch.bool).index_fill(0, index, False)
        weight, bias = weights[name]
        bias = None if bias is None else bias[index].to(dtype)
        with torch.no_grad():
            y, plain = layer(x), untouched.get_submodule(name)(x)
            exact = linear(x, weight[index].to(dtype), bias)
        assert torch.equal(y[..., index], exact), name
        assert torch.equal(y[..., others], plain[..., others]), name
        assert not torch.equal(y[..., index], plain[..., index]), name


def test_outputs_and_gradients_are_those_of_the_rows_put_into_the_weight(base, bits):
    model = selected(base, bits).train()
    fill_deltas(model)
    for layer in spft_layers(model).values():
        delta = layer.spft_delta["default"]
        weight = dense_weight(layer.get_base_layer()).float()
        rows = (delta.anchor.float() + delta.weight.detach()).requires_grad_()
        bias = layer.get_base_layer().bias
        x = torch.randn(2, 5, layer.in_features)
        upstream = torch.randn(2, 5, layer.out_features)
        results = []
        for ours in (True, False):
            given = x.clone().requires_grad_()
            y = (
                layer(given)
                if ours
                else linear(given, weight.index_copy(0, delta.index, rows), bias)
            )
            (y * upstream).sum().backward()
            results.append((y, given.grad, delta.weight.grad if ours else rows.grad))
        for ours, plain in zip(*results, strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5 * plain.abs().max().item())


@pytest.mark.parametrize("quant_init", ["exact", "none"])
def test_autocast_over_fp32_activations(llama, bits, quant_init):
    """kbit preparation leaves norms and embeddings in fp32, and trainers autocast."""
    model = prepare_model_for_kbit_training(quantised(llama, bits, torch.bfloat16))
    model = get_peft_model(
        model, SpftConfig(r=4, importance="group_taylor", quant_init=quant_init)
    ).train()
    with torch.autocast("cpu", torch.bfloat16):
        select_neurons(model, [batch()])
        loss = model(**batch()).loss
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.requires_grad]
    assert all(g.isfinite().all() and g.abs().sum() > 0 for g in grads)


def test_one_layer_with_a_bias_is_calibrated_in_the_models_dtype(tmp_path, bits):
    """bitsandbytes turns a 4-bit layer's bias into its compute dtype, which may be another."""
    folder = save_base(tmp_path / "base", "llama_bias")
    config = {"load_in_4bit": True} if bits == 4 else {"load_in_8bit": True}
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=BitsAndBytesConfig(**config), dtype=torch.bfloat16
    )
    model = get_peft_model(model, SpftConfig(r=4, target_modules=["q_proj"]))
    select_neurons(model, [batch()])


def test_a_dense_adapter_goes_on_over_the_quantised_base_from_its_own_rows(llama, bits, tmp_path):
    sft = get_peft_model(dense(llama, torch.bfloat16), SpftConfig(r=4, importance="magnitude"))
    select_neurons(sft)
    fill_deltas(sft)
    sft.save_pretrained(tmp_path)
    for quant_init in (None, "none"):
        config = SpftConfig(start_adapter=str(tmp_path), quant_init=quant_init)
        model = get_peft_model(quantised(llama, bits), config)
        for name, layer in spft_layers(model).items():
            theirs = spft_layers(sft)[name].spft_delta["default"]
            rows = original(llama)[name][0][theirs.index]
            exact = (rows + theirs.weight.detach()).to(torch.bfloat16)
            anchor = layer.spft_delta["default"].anchor
            assert torch.equal(anchor, exact) == (quant_init is None), name


def test_a_configuration_used_for_a_dense_model_before_starts_exactly(llama, bits):
    config = SpftConfig(r=4, importance="magnitude")
    assert get_peft_model(dense(llama), config).peft_config["default"].anchor == "none"
    model = get_peft_model(quantised(llama, bits), config)
    assert model.peft_config["default"].anchor == "checkpoint"
    assert config.anchor is None


def test_deltas_in_bf16_compute_what_the_same_values_in_fp32_do(llama):
    """Such as TRL makes of them in training; loaded, they are fp32."""
    model = selected(llama, 4).train()
    fill_deltas(model)
    tensors = [layer.spft_delta["default"].weight for layer in spft_layers(model).values()]
    results = []
    for dtype in (torch.bfloat16, torch.float32):
        for tensor in tensors:
            tensor.data = tensor.data.to(dtype)
            tensor.grad = None
        loss = model(**batch()).loss
        loss.backward()
        results.append((loss, [tensor.grad.to(torch.bfloat16) for tensor in tensors]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(map(torch.equal, results[0][1], results[1][1]))


def test_adapter_off_goes_back_to_the_start_with_the_adapter_on_around_it(base, bits):
    model = selected(base, bits).train()
    tokens = batch()
    before = model(**tokens).logits.detach()
    fill_deltas(model)
    loss = model(**tokens).loss
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(**tokens).logits, before)
    loss.backward()
    trained = model(**tokens).logits.detach()
    assert not torch.equal(trained, before)
    with model.disable_adapter():
        assert torch.equal(model(**tokens).logits, before)


def test_a_second_adapter_of_the_same_configuration_starts_from_the_same_rows(llama, bits):
    model = get_peft_model(quantised(llama, bits), SpftConfig(r=4, importance="magnitude"))
    model.add_adapter("ref", model.peft_config["default"])
    select_neurons(model)
    model.eval()
    logits = model(**batch()).logits
    model.set_adapter("ref")
    assert torch.equal(model(**batch()).logits, logits)


@pytest.mark.parametrize("metric", METRICS)
def test_calibration_runs_on_the_quantised_weights(llama, bits, metric):
    """The neurons are those that a dense model of the dequantised weights selects."""
    model = get_peft_model(quantised(llama, bits), SpftConfig(r=4, importance=metric))
    plain = dense(llama)
    for name, layer in spft_layers(model).items():
        plain.get_submodule(name).weight.data = dense_weight(layer.get_base_layer()).float()
    plain = get_peft_model(plain, SpftConfig(r=4, importance=metric))
    batches = [batch(seed) for seed in (0, 1)]
    ours, theirs = select_neurons(model, batches), select_neurons(plain, batches)
    same = [torch.equal(ours.index[n], theirs.index[n]) for n in theirs.index]
    # zo_taylor divides loss differences of 1e-3 by 2e-3: their rounding decides close calls
    assert sum(same) >= (0.8 if metric == "zo_taylor" else 1) * len(same)


def test_without_exact_rows_a_fresh_adapter_is_the_quantised_model(llama, bits):
    model = selected(llama, bits, quant_init="none").train()
    assert model.peft_config["default"].anchor == "none"
    with torch.no_grad():
        plain = quantised(llama, bits).train()(**batch()).logits
        assert torch.equal(model(**batch()).logits, plain)


def test_evaluating_does_not_change_the_weights_that_training_goes_on_with(llama):
    model = selected(llama, 4, torch.bfloat16).train()
    before = model(**batch()).loss
    model.eval()
    with torch.no_grad():
        model(**batch())
    model.train()
    after = model(**batch()).loss
    assert torch.equal(after, before)
    after.backward()
    first = next(iter(spft_layers(model).values()))
    assert first.spft_delta["default"].weight.grad.abs().sum() > 0


def test_saved_and_loaded_it_is_the_same_bit_for_bit(base, bits, tmp_path):
    model = selected(base, bits).train()
    fill_deltas(model)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(quantised(base, bits), tmp_path).train()
    assert torch.equal(loaded(**batch()).logits, model(**batch()).logits)
    for name, layer in spft_layers(loaded).items():
        anchor = spft_layers(model)[name].spft_delta["default"].anchor
        assert anchor.dtype == torch.bfloat16
        assert torch.equal(layer.spft_delta["default"].anchor, anchor)


def test_merged_it_is_the_original_checkpoint_plus_delta(base, bits, tmp_path):
    model = selected(base, bits)
    fill_deltas(model)
    model.save_pretrained(tmp_path / "adapter")
    merge_checkpoint(tmp_path / "adapter", tmp_path / "merged")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    expected = load_file(base / "model.safetensors")
    for name, layer in spft_layers(model).items():
        delta = layer.spft_delta["default"]
        weight = expected[f"{name}.weight"]
        weight = weight.t() if "gpt2" in str(base) else weight
        weight[delta.index] = (weight[delta.index] + delta.weight.detach()).to(weight.dtype)
    assert merged.keys() == expected.keys()
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())

    by_peft = PeftModel.from_pretrained(dense(base, torch.bfloat16), tmp_path / "adapter")
    for name, tensor in by_peft.merge_and_unload().state_dict().items():
        assert torch.equal(tensor, merged.get(name, tensor)), name


def test_merging_into_quantised_weights_is_refused(llama, bits):
    model = selected(llama, bits)
    with pytest.raises(SpftError, match=f"in {bits} bits.*spft merge"):
        model.merge_and_unload()
    with pytest.raises(SpftError, match=f"in {bits} bits"):
        model.merge_adapter()

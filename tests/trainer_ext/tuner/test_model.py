"""On every supported architecture: a fresh adapter is the identity, the gradient of delta is the
selected rows of the dense gradient (1e-6), and merging writes W + delta into the selected rows and
leaves every other weight bit-identical. Unmerging, disabling and deleting restore the base model
bit for bit."""

from __future__ import annotations

import pytest
import torch
from adapters import fill_deltas, selected, trained, wrapped
from oracles import mean_gradients, rows_of, weights
from peft import get_peft_model
from tiny_models import CONFIGS, batch, tiny_model

from trainer_ext import SpftConfig, SpftError, select_neurons
from trainer_ext.tuner.model import deltas, is_selected, spft_layers

ARCHITECTURES = sorted(CONFIGS)
LLAMA_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
)


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(**batch()).logits


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_fresh_adapter_is_the_identity(architecture):
    base = logits(tiny_model(architecture).eval())
    for model in (wrapped(architecture), selected(architecture)):
        assert torch.equal(logits(model.eval()), base)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_targets_are_all_linear_layers_but_the_head(architecture):
    expected = {n for n in weights(tiny_model(architecture)) if n != "lm_head"}
    assert set(spft_layers(wrapped(architecture))) == expected


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_delta_is_trained_and_it_is_compact(architecture):
    model = selected(architecture)
    names = {n: p.shape for n, p in model.named_parameters() if p.requires_grad}
    assert names == {
        f"base_model.model.{name}.spft_delta.default.weight": (4, layer.in_features)
        for name, layer in spft_layers(model).items()
    }


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["off", "reentrant", "not"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradient_equals_the_dense_gradients_rows(architecture, checkpointing):
    model = selected(architecture)
    fill_deltas(model)
    if checkpointing is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    model.train()
    model(**batch(padding=True)).loss.backward()
    expected = mean_gradients(dense_twin(model, architecture), [batch(padding=True)])
    for name, delta in deltas(model).items():
        rows = expected[name][delta.index]
        assert (delta.weight.grad - rows).abs().max() <= 1e-6 * max(1.0, rows.abs().max())


def dense_twin(model, architecture):
    """The plain model whose weights hold W + delta, made without the package's own merge."""
    twin = tiny_model(architecture).train()
    for name, delta in deltas(model).items():
        layer = twin.get_submodule(name)
        with torch.no_grad():
            rows_of(layer, layer.weight)[delta.index] += delta.weight
    return twin


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_merge_changes_the_selected_rows_alone(architecture, dtype):
    model = trained(architecture, dtype)
    before = weights(tiny_model(architecture, dtype=dtype))
    updates = {n: (d.index.clone(), d.weight.detach().clone()) for n, d in deltas(model).items()}
    merged = weights(model.merge_and_unload())
    for name, old in before.items():
        expected = old.clone()
        if name in updates:
            index, delta = updates[name]
            expected[index] = (old[index].float() + delta).to(dtype)
            assert not torch.equal(expected, old)
        assert torch.equal(merged[name], expected), name


@pytest.mark.parametrize("architecture", ["llama_bias", "gpt2"])
def test_merged_model_computes_the_same(architecture):
    model = trained(architecture).eval()
    expected = logits(model)
    torch.testing.assert_close(logits(model.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerge_restores_every_bit(dtype):
    model = trained(dtype=dtype)
    before = weights(model.get_base_model())
    fresh = logits(model.eval())
    model.merge_adapter()
    assert any(not torch.equal(w, before[n]) for n, w in weights(model.get_base_model()).items())
    model.unmerge_adapter()
    for name, weight in weights(model.get_base_model()).items():
        assert torch.equal(weight, before[name])
    assert torch.equal(logits(model), fresh)


def test_safe_merge_refuses_non_finite_values_and_leaves_the_weight():
    model = trained()
    layer = next(iter(spft_layers(model).values()))
    layer.spft_delta["default"].weight.data[0, 0] = float("nan")
    before = layer.get_base_layer().weight.clone()
    with pytest.raises(SpftError, match="non-finite"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, before)


def test_disabled_adapter_is_the_base_model():
    model = trained().eval()
    base, adapted = logits(tiny_model().eval()), logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), adapted)
    model.merge_adapter()
    with model.disable_adapter():  # unmerges, and exactly
        assert torch.equal(logits(model), base)


def test_unload_gives_the_base_model_back():
    assert torch.equal(logits(trained().unload().eval()), logits(tiny_model().eval()))


def test_several_adapters_add_switch_and_go():
    model = trained().eval()
    first = logits(model)
    model.add_adapter("second", SpftConfig(r=6, importance="magnitude"))
    select_neurons(model, adapter_name="second")
    fill_deltas(model, "second", scale=0.1)
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    second = logits(model)
    assert not torch.equal(second, first)
    model.base_model.set_adapter(["default", "second"])
    both = logits(model)
    assert not torch.equal(both, second)
    model.merge_adapter()
    torch.testing.assert_close(logits(model), both, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    assert torch.equal(logits(model), both)
    model.delete_adapter("second")
    model.set_adapter("default")
    assert torch.equal(logits(model), first)


def test_an_adapter_with_the_same_configuration_takes_over_the_selection():
    """TRL makes its reference adapter so, and copies parameters but no buffers."""
    model = trained()
    model.add_adapter("ref", model.peft_config["default"])
    theirs, ours = deltas(model, "ref"), deltas(model)
    assert all(torch.equal(theirs[n].index, ours[n].index) for n in ours)
    model.add_adapter("other", SpftConfig(r=4, importance="magnitude"))
    assert not is_selected(model, "other")


def test_training_before_selection_is_an_error_but_evaluation_is_not():
    model = wrapped().train()
    with pytest.raises(SpftError, match="before its neurons are selected"):
        model(**batch())
    model.eval()
    assert torch.equal(logits(model), logits(tiny_model().eval()))


def test_modules_to_save_are_trained_whole():
    model = selected("llama_bias", modules_to_save=["lm_head"])
    trainable = {n for n, p in model.named_parameters() if p.requires_grad}
    assert any("lm_head.modules_to_save.default" in n for n in trainable)
    model.train()
    model(**batch()).loss.backward()
    head = next(p for n, p in model.named_parameters() if "modules_to_save.default" in n)
    assert head.grad.abs().sum() > 0


@pytest.mark.parametrize(
    ("fields", "count"),
    [
        ({"target_modules": ["q_proj", "down_proj"]}, 4),
        ({"target_modules": r".*layers\.1\.mlp\..*"}, 3),
        ({"target_modules": "all-linear", "exclude_modules": ["q_proj"]}, 12),
        ({"target_modules": ["up_proj"], "layers_to_transform": [1]}, 1),
        ({"exclude_modules": r".*self_attn.*"}, 6),
    ],
)
def test_targets_by_name_and_regular_expression(fields, count):
    assert len(spft_layers(wrapped(**fields))) == count


def test_density_gives_every_layer_its_share():
    for layer in spft_layers(wrapped(r=None, density=0.1)).values():
        assert layer.spft_delta["default"].weight.shape[0] == max(
            1, round(0.1 * layer.out_features)
        )


def test_a_tied_head_is_refused():
    with pytest.raises(SpftError, match=r"lm_head.*tied"):
        wrapped("llama", target_modules=["lm_head"])


def test_an_untied_head_may_be_a_target():
    assert "lm_head" in spft_layers(wrapped("llama_bias", target_modules=["lm_head"]))


def test_by_default_a_small_layer_is_trained_whole():
    """Only an r that was asked for is an error where a layer is smaller."""
    for layer in spft_layers(wrapped(r=None)).values():
        assert layer.spft_delta["default"].weight.shape[0] == min(64, layer.out_features)


def test_copies_of_modules_to_save_are_no_targets():
    model = wrapped("llama_bias", modules_to_save=["lm_head"])
    model.add_adapter("second", SpftConfig(r=2, importance="random"))
    assert set(spft_layers(model, "second")) == set(spft_layers(model))


def test_unmerging_restores_the_base_after_deletion_and_in_another_dtype():
    model = trained()
    before = weights(tiny_model())
    model.merge_adapter()
    for layer in spft_layers(model).values():
        layer.delete_adapter("default")
        layer.unmerge()
    for name, weight in weights(model.get_base_model()).items():
        assert torch.equal(weight, before[name.removesuffix(".base_layer")])
    other = trained()
    other.merge_adapter()
    other.to(torch.bfloat16)
    other.unmerge_adapter()
    for name, weight in weights(other.get_base_model()).items():
        assert torch.equal(weight, before[name.removesuffix(".base_layer")].to(torch.bfloat16))


def test_a_taken_over_selection_is_told(caplog):
    model = trained()
    assert "starts with its neurons" not in caplog.text
    model.add_adapter("ref", model.peft_config["default"])
    assert caplog.text.count("starts with its neurons") == 1


def test_what_looks_trained_but_is_not_is_told(caplog):
    from transformers import MixtralConfig, MixtralForCausalLM

    fields = {k: v for k, v in CONFIGS["mistral"].to_dict().items() if k in LLAMA_FIELDS}
    mixtral = MixtralForCausalLM(MixtralConfig(**fields, num_local_experts=2))
    names = ["q_proj", "gate_proj"]
    model = get_peft_model(mixtral, SpftConfig(r=2, target_modules=names))
    assert "target_modules names gate_proj" in caplog.text
    assert "4 fused expert weights, first model.layers.0.mlp.experts.gate_up_proj" in caplog.text
    assert {name.rsplit(".", 1)[1] for name in spft_layers(model)} == {"q_proj"}
    caplog.clear()
    wrapped(target_modules=["q_proj"])
    assert not caplog.text


def test_compiled_forward_equals_eager():
    model = trained().eval()
    expected = logits(model)
    fresh = wrapped().eval()
    compiled = torch.compile(fresh, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(**batch()).logits, logits(tiny_model().eval()))
        select_neurons(fresh)  # after compiling: the graph must not have fixed the old state
        fill_deltas(fresh)
        torch.testing.assert_close(compiled(**batch()).logits, expected, rtol=1e-5, atol=1e-5)


def test_bf16_base_keeps_fp32_deltas_and_trains_under_autocast():
    model = trained(dtype=torch.bfloat16).train()
    assert {d.weight.dtype for d in deltas(model).values()} == {torch.float32}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        model(**batch()).loss.backward()
    assert all(d.weight.grad.dtype == torch.float32 for d in deltas(model).values())
    assert all(bool(d.weight.grad.abs().sum() > 0) for d in deltas(model).values())


def test_sequence_classification_leaves_the_score_head_alone():
    from transformers import LlamaForSequenceClassification

    model = LlamaForSequenceClassification(CONFIGS["llama"])
    names = set(spft_layers(get_peft_model(model, SpftConfig(r=2, task_type="SEQ_CLS"))))
    assert "score" not in names
    assert len(names) == 14

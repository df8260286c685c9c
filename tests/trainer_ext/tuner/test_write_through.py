"""Write-through: a training layer's forward is the plain layer's on round(W0 + delta), and its
gradients are the dense layer's for the selected rows, whichever adapters are active between."""

from __future__ import annotations

import copy

import pytest
import torch
from adapters import fill_deltas, selected, trained
from short_runs import checkpointed, run_compact, run_dense
from tiny_models import batch, tiny_model
from written import (
    base_weights,
    gradients,
    is_base,
    logits,
    originals,
    step_once,
    training,
    without_dropout,
)

from trainer_ext import (
    SpftConfig,
    restore_base,
    select_neurons,
    write_through,
)
from trainer_ext.tuner.model import deltas, spft_layers

ARCHITECTURES = ["llama", "llama_bias", "gpt2"]


# The computation


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_forward_is_the_merged_models_to_the_bit(architecture, dtype):
    model = training(architecture, dtype)
    merged = without_dropout(trained(architecture, dtype).merge_and_unload())
    assert torch.equal(model(**batch()).logits, merged(**batch()).logits)
    assert torch.equal(logits(model.eval()), logits(merged))


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["off", "reentrant", "not"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_equal_the_delta_paths(architecture, checkpointing):
    ours = without_dropout(trained(architecture).train())
    theirs = without_dropout(trained(architecture, forward="delta").train())
    for model in (ours, theirs):
        checkpointed(model, checkpointing)
    write_through(ours)
    expected = gradients(theirs, batch(padding=True))
    assert all(layer.written is None for layer in spft_layers(theirs).values())
    for name, gradient in gradients(ours, batch(padding=True)).items():
        scale = expected[name].abs().max()
        assert (gradient - expected[name]).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_fifty_steps_equal_the_delta_path_and_dense_masked_training(architecture):
    losses, adapter = run_compact(architecture, "auto", 50)
    for other_losses, other in (
        run_compact(architecture, "delta", 50),
        run_dense(architecture, 50),
    ):
        torch.testing.assert_close(losses, other_losses, rtol=1e-6, atol=0)
        for name, delta in adapter.items():
            assert (delta - other[name]).norm() <= 1e-5 * other[name].norm()


def test_bf16_rows_are_the_rounded_sum_and_small_updates_are_not_lost():
    model = selected(dtype=torch.bfloat16).train()
    write_through(model)
    layer, delta = next(iter(spft_layers(model).values())), next(iter(deltas(model).values()))
    assert delta.weight.dtype == torch.float32
    before = layer.rows(delta.index)
    optimizer = torch.optim.SGD([delta.weight], lr=1.0)
    for step in range(1, 65):
        # an eighth of bf16's least step: each alone is rounded away
        delta.weight.grad = -before.float() * 2**-11
        optimizer.step()
        exact = before.float() + delta.weight.detach()
        written = layer.get_base_layer().weight[delta.index]
        assert torch.equal(written, exact.to(torch.bfloat16))
        if step == 1:
            assert torch.equal(written, before)
    assert ((written.abs() > before.abs()) | (before == 0)).all()
    assert torch.equal(layer.rows(delta.index), before)


def test_autocast_trains_an_fp32_base_in_bf16():
    ours, theirs = training(), trained(forward="delta").train()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got, expected = gradients(ours, batch()), gradients(theirs, batch())
    for name, gradient in expected.items():
        assert got[name].dtype == torch.float32
        assert (got[name] - gradient).norm() <= 2**-5 * gradient.norm()


def test_a_compiled_model_equals_eager():
    eager, compiled = training(), training()
    expected = gradients(eager, batch())
    step = torch.compile(lambda data: compiled(**data).loss, backend="aot_eager")
    for _ in range(2):
        compiled.zero_grad()
        step(batch()).backward()
        for name, delta in deltas(compiled).items():
            torch.testing.assert_close(delta.weight.grad, expected[name], rtol=1e-4, atol=1e-6)
        # a step changes delta and rows alike; the graph must use the new ones
        for model in (eager, compiled):
            optimizer = torch.optim.SGD([d.weight for d in deltas(model).values()], lr=0.1)
            for name, delta in deltas(model).items():
                delta.weight.grad = expected[name]
            optimizer.step()
        expected = gradients(eager, batch())
        with torch.no_grad():
            assert torch.allclose(step(batch()), eager(**batch()).loss, rtol=1e-5)


# Other sets of adapters


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_reference_forward_between_forward_and_backward(architecture):
    model = training(architecture)
    expected = gradients(model, batch())
    model.zero_grad()
    versions = {n: w._version for n, w in base_weights(model).items()}
    loss = model(**batch()).loss
    with torch.no_grad(), model.disable_adapter():
        reference = model(**batch(5)).logits
    loss.backward()
    assert {n: w._version for n, w in base_weights(model).items()} == versions
    for name, delta in deltas(model).items():
        assert torch.equal(delta.weight.grad, expected[name])
    torch.testing.assert_close(
        reference, logits(without_dropout(tiny_model(architecture)), batch(5)), rtol=1e-5, atol=1e-5
    )


def test_a_reference_adapter_between_forward_and_backward():
    model = selected().train()
    step_once(model)
    model.add_adapter("ref", copy.deepcopy(model.peft_config["default"]))
    fill_deltas(model, "ref", scale=0.02)
    model.set_adapter("default")
    fill_deltas(model)
    expected = gradients(model, batch())
    model.zero_grad()
    loss = model(**batch()).loss
    model.set_adapter("ref")
    with torch.no_grad():
        reference = model(**batch()).logits
    model.set_adapter("default")
    loss.backward()
    for name, delta in deltas(model).items():
        assert torch.equal(delta.weight.grad, expected[name])
    restore_base(model)
    model.set_adapter("ref")
    torch.testing.assert_close(reference, logits(model), rtol=1e-5, atol=1e-5)


def test_gradients_flow_through_a_disabled_adapter_as_through_the_base():
    model = training("llama_bias")
    model.enable_input_require_grads()
    inputs = model.get_input_embeddings()(batch()["input_ids"]).detach()
    results = []
    for network in (model, tiny_model("llama_bias")):
        x = inputs.clone().requires_grad_()
        data = {"inputs_embeds": x, "labels": batch()["labels"]}
        if network is model:
            with model.disable_adapter():
                model(**data).loss.backward()
        else:
            network(**data).loss.backward()
        results.append(x.grad)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-6)


def test_two_active_adapters_add_and_train_beside_written_rows():
    model, plain = training(), trained()
    for network in (model, plain):
        network.add_adapter("other", SpftConfig(r=3, importance="random", seed=7))
        select_neurons(network, adapter_name="other")
        fill_deltas(network, "other", scale=0.1)
        network.set_adapter("default")
    write_through(model)
    for network in (model, plain):
        network.base_model.set_adapter(["default", "other"])
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)
    for active in ("default", "other"):
        model.set_adapter(active)
        plain.set_adapter(active)
        torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)
    # the written adapter is another one: `other` trains by the delta path
    model.train()
    plain.train()
    for network in (model, plain):
        network.zero_grad()
        network(**batch()).loss.backward()
    for name, delta in deltas(model, "other").items():
        torch.testing.assert_close(
            delta.weight.grad, deltas(plain, "other")[name].weight.grad, rtol=1e-4, atol=1e-6
        )
    write_through(model, "other")
    assert {layer.written.adapter for layer in spft_layers(model).values()} == {"other"}
    torch.testing.assert_close(logits(model), logits(plain), rtol=1e-5, atol=1e-5)
    model.delete_adapter("other")
    assert is_base(model)


def test_rows_are_the_base_weights_whatever_is_written():
    model = training()
    for name, layer in spft_layers(model).items():
        everything = torch.arange(layer.out_features).flip(0)
        assert torch.equal(layer.rows(everything), originals()[name].flip(0))

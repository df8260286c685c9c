"""The written rows follow the delta, whatever changes it, and the adapter that trains; weights
that are not whole are never written."""

from __future__ import annotations

import pytest
import torch
from adapters import fill_deltas, selected, trained
from peft import get_peft_model, get_peft_model_state_dict
from tiny_models import batch, few_tokens, tiny_model, wide_model
from transformers.optimization import Adafactor
from written import (
    base_weights,
    gradients,
    is_base,
    logits,
    originals,
    step_once,
    training,
)

from trainer_ext import (
    SelectedNeuronAdamW,
    SpftConfig,
    SpftError,
    restore_base,
    select_neurons,
    trained_parameters,
    write_through,
)
from trainer_ext.tuner import write_through as written
from trainer_ext.tuner.model import deltas, spft_layers


@pytest.mark.parametrize("limit", [0, 1000, 2**24])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_rows_rewritten_together_are_each_the_rounded_sum(monkeypatch, architecture, limit):
    """Also where the weights of one model are of two dtypes, as beside a layer kept in fp32."""
    monkeypatch.setattr(written, "_BUCKET_ELEMENTS", {"cpu": limit})
    base = tiny_model(architecture)
    for name, module in base.named_modules():
        if name.endswith(("v_proj", "down_proj", "c_proj")):
            module.to(torch.bfloat16)
    model = get_peft_model(base, SpftConfig(r=4, importance="random"))
    select_neurons(model)
    fill_deltas(model)
    layers = spft_layers(model)
    before = {name: layer.rows(layer.spft_delta["default"].index) for name, layer in layers.items()}
    assert {rows.dtype for rows in before.values()} == {torch.float32, torch.bfloat16}
    buckets = list(written._buckets(layers.values())) if write_through(model) else []
    assert (len(buckets) == len(layers)) == (limit == 0)
    assert (len(buckets) == 1) == (limit == 2**24)
    for name, layer in layers.items():
        delta, weight = layer.spft_delta["default"], layer.get_base_layer().weight
        rows = (weight.t() if layer.is_conv1d else weight)[delta.index]
        expected = (before[name].float() + delta.weight.detach()).to(before[name].dtype)
        assert torch.equal(rows, expected)
        assert not torch.equal(rows, before[name])


def test_rows_follow_optimizers_loads_and_direct_writes():
    model = training()
    layer, delta = next(iter(spft_layers(model).values())), next(iter(deltas(model).values()))
    base = layer.rows(delta.index)

    def in_step() -> bool:
        written = layer.get_base_layer().weight[delta.index]
        return torch.equal(written, base + delta.weight.detach())

    optimizer = torch.optim.AdamW([d.weight for d in deltas(model).values()], lr=0.1)
    model(**batch()).loss.backward()
    optimizer.step()
    assert in_step()  # by the optimizer's hook, before any forward
    state = {
        key: value + 1
        for key, value in get_peft_model_state_dict(model).items()
        if key.endswith("weight")
    }
    model.load_state_dict(
        {key.replace("spft_delta", "spft_delta.default"): value for key, value in state.items()},
        strict=False,
    )
    assert in_step()
    with torch.no_grad():
        delta.weight.mul_(2)
    assert not in_step()
    model(**batch())
    assert in_step()
    delta.weight.data.mul_(2)
    write_through(model)
    assert in_step()


def bitsandbytes_adamw(parameters):
    import bitsandbytes

    return bitsandbytes.optim.AdamW8bit(parameters, lr=0.01)


@pytest.mark.parametrize(
    "make",
    [
        lambda p: SelectedNeuronAdamW(p, lr=0.01, fused=True),
        lambda p: SelectedNeuronAdamW(p, lr=0.01, foreach=True),
        lambda p: SelectedNeuronAdamW(p, lr=0.01, state_bits=8),
        lambda p: torch.optim.SGD(p, lr=0.01, fused=True),
        lambda p: Adafactor(p, lr=0.01, relative_step=False),
        bitsandbytes_adamw,
    ],
    ids=["fused", "foreach", "8-bit", "sgd", "adafactor", "bitsandbytes"],
)
def test_rows_follow_every_optimizer_before_the_next_forward(make):
    # r x d_in is 12,288 and more: large enough for 8-bit moments
    model = get_peft_model(wide_model(), SpftConfig(r=32, importance="random"))
    select_neurons(model)
    model.train()
    write_through(model)
    optimizer = make(trained_parameters(model))
    for data in few_tokens():
        model(**data).loss.backward()
        before = {n: d.weight.detach().clone() for n, d in deltas(model).items()}
        optimizer.step()
        optimizer.zero_grad()
        for name, layer in spft_layers(model).items():
            delta = deltas(model)[name].weight
            assert not torch.equal(delta, before[name])
            held = layer.get_base_layer().weight[layer.written.index]
            assert torch.equal(held, layer.written.rows + delta)


def test_writing_begins_when_an_optimizer_has_stepped_the_deltas():
    """Not before: what steps copies of them and writes back through `.data` cannot be followed."""
    model = trained().train()
    parameters = trained_parameters(model)
    masters = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
    unseen = torch.optim.SGD(masters, lr=0.1)
    for _ in range(3):
        model(**batch()).loss.backward()
        for master, parameter in zip(masters, parameters, strict=True):
            master.grad, parameter.grad = parameter.grad, None
        unseen.step()
        for master, parameter in zip(masters, parameters, strict=True):
            parameter.data.copy_(master.data)
        assert all(layer.written is None for layer in spft_layers(model).values())
    step_once(model)
    model(**batch())
    assert all(layer.written is not None for layer in spft_layers(model).values())


def test_an_optimizer_in_the_backward():
    models = [training(), trained(forward="delta").train()]
    for model in models:
        for delta in deltas(model).values():
            optimizer = torch.optim.SGD([delta.weight], lr=0.1, fused=True)

            def step(parameter, optimizer=optimizer):
                optimizer.step()
                parameter.grad = None

            delta.weight.register_post_accumulate_grad_hook(step)
        for _ in range(3):
            model(**batch()).loss.backward()
    for name, delta in deltas(models[0]).items():
        torch.testing.assert_close(delta.weight, deltas(models[1])[name].weight)
    torch.testing.assert_close(logits(models[0]), logits(models[1]), rtol=1e-5, atol=1e-5)


def test_the_adapter_that_trains_takes_the_rows_over():
    model = training()
    model.add_adapter("other", SpftConfig(r=3, importance="random", seed=7))
    select_neurons(model, adapter_name="other")
    model.set_adapter("other")
    model.train()
    optimizer = torch.optim.SGD([d.weight for d in deltas(model, "other").values()], lr=0.1)
    for _ in range(2):
        model(**batch()).loss.backward()
        optimizer.step()
    # the first step put the old rows back, the forward after it wrote the new ones
    assert {layer.written.adapter for layer in spft_layers(model).values()} == {"other"}
    restore_base(model)
    assert is_base(model)


def test_another_selection_moves_the_written_rows():
    model = selected().train()
    write_through(model)
    other = {n: (d.index + 1) for n, d in deltas(model).items()}
    for name, delta in deltas(model).items():
        delta.select(other[name])
    fill_deltas(model)
    model(**batch())
    for name, layer in spft_layers(model).items():
        assert torch.equal(layer.written.index, other[name])
    restore_base(model)
    assert is_base(model)


def test_moving_to_another_dtype_takes_the_kept_rows_along():
    model = training()
    model.to(torch.bfloat16)
    model(**batch())
    assert {layer.written.rows.dtype for layer in spft_layers(model).values()} == {torch.bfloat16}
    restore_base(model)
    expected = {name: w.to(torch.bfloat16) for name, w in originals().items()}
    assert all(torch.equal(w, expected[n]) for n, w in base_weights(model).items())


# Weights that are not whole


def test_a_weight_that_two_modules_hold_is_not_written():
    base = tiny_model()
    base.model.layers[1].mlp.up_proj.weight = base.model.layers[0].mlp.up_proj.weight
    model = get_peft_model(base, SpftConfig(r=4, importance="random"))
    select_neurons(model)
    fill_deltas(model)
    write_through(model)
    model.train()(**batch())
    layers = spft_layers(model)
    shared = {name for name, layer in layers.items() if layer.written is None}
    assert shared == {"model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"}
    for delta in layers["model.layers.0.mlp.up_proj"]._configs.values():
        delta.forward = "write_through"
    with pytest.raises(SpftError, match=r"weight of model\.layers\.0\.mlp\.up_proj is .* used by"):
        write_through(model)


def test_a_weight_put_in_anothers_place_is_not_written():
    """As FSDP2 does in every forward: what is written to such a weight is lost."""
    model = training()
    expected = logits(model)
    for layer in spft_layers(model).values():
        base = layer.get_base_layer()
        base.weight = torch.nn.Parameter(base.weight.detach().clone(), requires_grad=False)
    versions = {n: w._version for n, w in base_weights(model).items()}
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    gradients(model, batch())
    assert {n: w._version for n, w in base_weights(model).items()} == versions
    assert not write_through(model)
    assert is_base(model)
    model(**batch())
    assert all(layer.written is None for layer in spft_layers(model).values())


def test_forward_delta_never_writes():
    model = trained(forward="delta").train()
    step_once(model)
    model(**batch())
    assert not write_through(model)
    assert is_base(model)

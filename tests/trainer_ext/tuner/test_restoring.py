"""From wherever an exception, a save, a copy, a load or a merge leaves a layer whose rows are
written, W0 comes back to the bit, and the model computes what its delta says."""

from __future__ import annotations

import copy

import pytest
import torch
from adapters import fill_deltas, selected, trained
from peft import get_peft_model_state_dict
from safetensors import SafetensorError
from tiny_models import batch, tiny_model
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict
from written import base_weights, gradients, is_base, logits, originals, step_once, training

from trainer_ext import restore_base, write_through, writing_through
from trainer_ext.tuner import write_through as written
from trainer_ext.tuner.model import deltas, spft_layers


def test_only_training_writes():
    model = trained()
    step_once(model)
    model.eval()(**batch())
    model.train()
    with torch.no_grad():
        model(**batch())
    model.requires_grad_(False)
    model(**batch())
    assert all(layer.written is None for layer in spft_layers(model).values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama_bias", "gpt2"])
def test_merge_unmerge_unload_and_restore_give_w0_to_the_bit(architecture, dtype):
    model = training(architecture, dtype)
    model.merge_adapter()
    merged = trained(architecture, dtype).merge_and_unload()
    for name, weight in base_weights(model).items():
        assert torch.equal(weight, merged.get_submodule(name).weight)
    model.unmerge_adapter()
    assert is_base(model, architecture, dtype)
    model(**batch())
    restore_base(model)
    assert is_base(model, architecture, dtype)
    model(**batch())
    base = model.unload()
    expected = originals(architecture, dtype)
    assert all(torch.equal(base.get_submodule(n).weight, w) for n, w in expected.items())


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_weight_that_others_cast_is_put_back_in_its_new_dtype(architecture):
    """As PEFT's preparation for quantised training casts, by `.data`."""
    model = training(architecture)
    for layer in spft_layers(model).values():
        weight = layer.get_base_layer().weight
        weight.data = weight.data.to(torch.bfloat16)
    restore_base(model)
    expected = originals(architecture)
    for name, weight in base_weights(model).items():
        assert torch.equal(weight, expected[name].to(torch.bfloat16))


class Fault(Exception):
    pass


def raise_fault(*args, **kwargs):
    raise Fault


def fault_in_forward(model, optimizer, folder):
    model.get_submodule("base_model.model.model.norm").register_forward_hook(raise_fault)
    model(**batch())


def fault_in_backward(model, optimizer, folder):
    loss = model(**batch()).loss
    list(deltas(model).values())[3].weight.register_hook(raise_fault)
    loss.backward()


def fault_in_step(model, optimizer, folder):
    model(**batch()).loss.backward()
    optimizer.register_step_post_hook(raise_fault)
    optimizer.step()


def fault_in_rewriting(model, optimizer, folder):
    model(**batch()).loss.backward()
    put, calls = written._put, []

    def fails_once_between(layer, index, rows):
        calls.append(layer)
        if len(calls) == 5:
            raise Fault
        put(layer, index, rows)

    written._put = fails_once_between
    try:
        optimizer.step()
    finally:
        written._put = put


def fault_in_reference(model, optimizer, folder):
    model.get_submodule("base_model.model.model.norm").register_forward_hook(raise_fault)
    model.eval()
    with torch.no_grad(), model.disable_adapter():
        model(**batch())


def fault_in_saving(model, optimizer, folder):
    (folder / "adapter_model.safetensors").mkdir()  # cannot be written over
    try:
        model.save_pretrained(folder)
    except SafetensorError:
        raise Fault from None


@pytest.mark.parametrize(
    "fault",
    [
        fault_in_forward,
        fault_in_backward,
        fault_in_step,
        fault_in_rewriting,
        fault_in_reference,
        fault_in_saving,
    ],
)
def test_after_a_fault_the_run_goes_on_and_w0_comes_back(fault, tmp_path):
    model, twin = training(), trained(forward="delta").train()
    optimizers = [
        torch.optim.SGD([d.weight for d in deltas(m).values()], lr=0.1) for m in (model, twin)
    ]
    gradients(model, batch())
    gradients(twin, batch())
    for optimizer in optimizers:
        optimizer.step()
    with pytest.raises(Fault):
        fault(model, optimizers[0], tmp_path)
    for module in model.modules():
        module._forward_hooks.clear()
    with torch.no_grad():
        for name, delta in deltas(twin).items():  # a fault may come after the step
            delta.weight.copy_(deltas(model)[name].weight)
    model.train()
    for _ in range(2):  # before and after W0 has been put back
        torch.testing.assert_close(logits(model), logits(twin), rtol=1e-5, atol=1e-5)
        restore_base(model)
        assert is_base(model)


def test_a_loop_of_ones_own_writes_through_inside_and_leaves_w0():
    model = trained().train()
    with writing_through(model) as written:
        assert written == len(spft_layers(model))
        assert not is_base(model)
        expected = logits(model)
    assert is_base(model)
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    with pytest.raises(Fault), writing_through(model):
        raise_fault()
    assert is_base(model)


# Files


def test_the_adapters_file_is_the_delta_paths():
    state, expected = get_peft_model_state_dict(training()), get_peft_model_state_dict(trained())
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], value) for key, value in expected.items())


def test_the_head_which_peft_saves_whole_is_never_written(tmp_path):
    """A checkpoint would hold W0 + delta for the base weight, and delta beside it."""
    model = training("llama_bias", target_modules=["lm_head", "q_proj"], layers=("lm_head",))
    assert spft_layers(model)["lm_head"].written is None
    state = get_peft_model_state_dict(model)
    saved = state["base_model.model.lm_head.base_layer.weight"]
    assert torch.equal(saved, tiny_model("llama_bias").lm_head.weight)


@pytest.mark.parametrize("into", ["fresh", "written"])
def test_the_whole_models_state_dict_holds_w0(into):
    model = training()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    other = selected(seed=3).train()
    if into == "written":
        fill_deltas(other, scale=0.3)
        write_through(other)
    other.load_state_dict(state, strict=True)
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-5, atol=1e-5)
    restore_base(other)
    assert is_base(other)


def test_distributed_checkpoints_hold_w0():
    model, other = training(), selected(seed=3)
    state = {key: value.clone() for key, value in get_model_state_dict(model).items()}
    set_model_state_dict(other, state)
    torch.testing.assert_close(logits(other), logits(model), rtol=1e-5, atol=1e-5)
    assert is_base(other)


def test_a_state_dict_from_before_writing_undoes_it():
    model = trained().train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    assert write_through(model)
    model.load_state_dict(state, strict=True)
    restore_base(model)
    assert is_base(model)


def test_a_copy_of_a_written_model():
    model = training()
    expected = logits(model)
    copied = copy.deepcopy(model)
    torch.testing.assert_close(logits(copied), expected, rtol=1e-5, atol=1e-5)
    got = gradients(copied, batch())
    for name, gradient in gradients(model, batch()).items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-4, atol=1e-6)
    restore_base(copied)
    assert is_base(copied)
    assert torch.equal(logits(model), expected)

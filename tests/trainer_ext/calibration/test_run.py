"""select_neurons in a loop of one's own: the scores are those of the given loss, the model is left
as it was even after an error, and what the loss flips in the middle is put back."""

from __future__ import annotations

import pytest
import torch
from adapters import wrapped
from oracles import group_taylor
from tiny_models import batch, tiny_model

from trainer_ext import measure_importance, select_neurons
from trainer_ext.calibration.mode import calibration_mode
from trainer_ext.ranking.selection import top_neurons
from trainer_ext.tuner.model import deltas, spft_layers

BATCHES = [batch(seed) for seed in range(2)]


def test_selects_the_top_neurons_of_the_formula():
    model = wrapped(importance="group_taylor")
    selection = select_neurons(model, BATCHES)
    expected = group_taylor(tiny_model(), BATCHES)
    for name, delta in deltas(model).items():
        assert torch.equal(delta.index, top_neurons(expected[name], 4))
        assert torch.equal(selection.index[name], delta.index)


def test_a_loss_of_ones_own():
    def last_token(model, inputs):
        return model(inputs["input_ids"]).logits[:, -1].logsumexp(-1).mean()

    model = wrapped(importance="group_taylor")
    base = tiny_model()
    base.zero_grad()
    last_token(base, BATCHES[0]).backward()
    layer = base.model.layers[1].mlp.down_proj
    expected = (layer.weight.double() * layer.weight.grad.double()).sum(1).abs()
    selection = select_neurons(model, BATCHES[:1], loss=last_token)
    name = "model.layers.1.mlp.down_proj"
    assert torch.equal(selection.index[name], top_neurons(expected, 4))


def state_of(model):
    return (
        [m.training for m in model.modules()],
        [p.requires_grad for p in model.parameters()],
        [p.grad for p in model.parameters()],
        [layer.calibrating for layer in spft_layers(model).values()],
        [getattr(m, "p", None) for m in model.modules()],
        [len(m._forward_hooks) for m in model.modules()],
        torch.get_rng_state().tolist(),
    )


@pytest.mark.parametrize("error", [None, RuntimeError("the loss failed")])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_the_model_is_left_as_it_was(architecture, error):
    model = wrapped(architecture, importance="group_taylor").eval()
    before = state_of(model)

    def run_batch(backward):
        torch.rand(5)
        loss = model(**BATCHES[0]).loss
        loss.backward()
        if error:
            raise error

    if error:
        with pytest.raises(RuntimeError, match="the loss failed"):
            measure_importance(model, [run_batch])
    else:
        measure_importance(model, [run_batch])
    assert state_of(model) == before


def test_flags_that_the_loss_flips_are_put_back():
    """DPO's reference forward under disable_adapter sets requires_grad back to True."""
    model = wrapped(importance="group_taylor")
    layers = spft_layers(model)
    model.requires_grad_(False)
    with calibration_mode(model, layers):
        with model.disable_adapter(), torch.no_grad():
            model(**BATCHES[0])
        assert any(p.requires_grad for p in model.parameters())
        model(**BATCHES[0])  # unselected and trainable: no error while calibrating
    assert not any(p.requires_grad for p in model.parameters())


def test_train_mode_without_randomness_inside():
    model = wrapped("gpt2")
    with calibration_mode(model, spft_layers(model)):
        assert model.training
        assert torch.equal(model(**BATCHES[0]).logits, model(**BATCHES[0]).logits)
    model.train()
    assert not torch.equal(
        tiny_model("gpt2").train()(**BATCHES[0]).logits,
        tiny_model("gpt2").eval()(**BATCHES[0]).logits,
    )


def test_integer_noise_and_foreign_configs_are_coped_with():
    """NEFTune's alpha may be an int; modules of one's own may have a dict for a config."""
    model = wrapped("gpt2")
    embeddings = model.get_input_embeddings()
    embeddings.neftune_noise_alpha = 5
    embeddings.config = {"dropout": 0.1}
    with calibration_mode(model, spft_layers(model)):
        assert embeddings.neftune_noise_alpha == 0
    assert embeddings.neftune_noise_alpha == 5
    assert embeddings.config == {"dropout": 0.1}


def test_gradients_that_were_there_before_stay():
    model = wrapped(importance="group_taylor", modules_to_save=["embed_tokens"])
    parameter = next(p for p in model.parameters() if p.requires_grad)
    parameter.grad = torch.ones_like(parameter)
    select_neurons(model, BATCHES)
    assert torch.equal(parameter.grad, torch.ones_like(parameter))


def test_without_gradients_a_model_prepared_for_checkpointing_keeps_no_activations():
    model = wrapped(importance="wanda")
    model.enable_input_require_grads()  # as PEFT and trainers do for checkpointing
    with calibration_mode(model, spft_layers(model), gradients=False):
        assert not model(**BATCHES[0]).loss.requires_grad
    with model.disable_adapter():
        assert model(**BATCHES[0]).loss.requires_grad


def test_doubts_are_logged(caplog):
    select_neurons(wrapped(importance="zo_taylor", zo_directions=2), BATCHES)
    assert "zo_taylor's ranking is mostly noise" in caplog.text
    assert "`" not in caplog.text


@pytest.mark.parametrize("importance", ["wanda", "group_taylor"])
def test_gradients_that_the_caller_has_switched_off(importance):
    """The metrics take no_grad for a reference model's forward."""
    expected = select_neurons(wrapped(importance=importance), BATCHES)
    with torch.no_grad():
        selection = select_neurons(wrapped(importance=importance), BATCHES)
    for name, index in expected.index.items():
        assert torch.equal(selection.index[name], index)

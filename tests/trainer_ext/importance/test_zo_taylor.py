"""zo_taylor equals taylor with gbar = mean of c z, c the two-sided difference of the loss along the
explicit noise z, with every weight really moved: 1e-5 of the layer's largest score in fp64, and in
fp32 what the rounding of the loss leaves. The weights are never touched, the noise depends on
(batch, direction, layer) alone, and a ranking that is noise is called that."""

from __future__ import annotations

import pytest
import torch
from adapters import wrapped
from calibrations import measured, runs
from oracles import ZO_DIRECTIONS as DIRECTIONS
from oracles import ZO_EPS as EPS
from oracles import explicit_noise, rounding_of_zo_taylor, zo_taylor
from tiny_models import CONFIGS, batch, tiny_model

from trainer_ext import measure_importance
from trainer_ext.calibration.mode import calibration_mode
from trainer_ext.importance import noise as noise_module
from trainer_ext.importance.base import CalibrationBatch
from trainer_ext.importance.metrics import zo_taylor as zo_module
from trainer_ext.importance.metrics.zo_taylor import NOISY_RANKING, ZoTaylor
from trainer_ext.importance.noise import weight_noise
from trainer_ext.tuner.model import spft_layers

BATCHES = [batch(seed) for seed in range(3)]


def zo_model(architecture="llama", dtype=torch.float32, **fields):
    fields = {"zo_directions": DIRECTIONS, "zo_eps": EPS, **fields}
    return wrapped(architecture, dtype, importance="zo_taylor", **fields)


def plain(architecture="llama"):
    return tiny_model(architecture, dtype=torch.float64).eval()  # eval: no dropout


@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_equals_the_formula_in_fp64(architecture):
    scores = measured(zo_model(architecture, torch.float64), BATCHES)
    expected = zo_taylor(plain(architecture), scores, BATCHES)
    for name, layer_scores in scores.items():
        error = (layer_scores - expected[name]).abs().max()
        assert error <= 1e-5 * expected[name].max(), name


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["off", "reentrant", "not"])
def test_in_fp32_the_error_is_the_rounding_of_the_loss(checkpointing):
    model = zo_model()
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    scores = measured(model, BATCHES)
    expected = zo_taylor(plain(), scores, BATCHES)
    rounding = rounding_of_zo_taylor("llama", scores)
    for name, layer_scores in scores.items():
        assert ((layer_scores - expected[name]).abs() <= rounding[name]).all(), name


@pytest.fixture
def small_chunks(monkeypatch):
    """Several chunks of noise a weight, as large models have: 20 rows of 10."""
    monkeypatch.setattr(noise_module, "CHUNK_ELEMENTS", 200)
    monkeypatch.setattr(zo_module, "CHUNK_ELEMENTS", 200)


def test_the_noise_is_a_function_of_batch_direction_and_layer_alone(small_chunks):
    first = weight_noise((1, 2, 3, "layer"), 1, 50, 10)
    torch.rand(7)  # the global generator plays no part
    assert torch.equal(first, weight_noise((1, 2, 3, "layer"), 1, 50, 10))
    assert first.shape == (20, 10)
    assert weight_noise((1, 2, 3, "layer"), 2, 50, 10).shape == (10, 10)
    for other in [(0, 2, 3, "layer"), (1, 0, 3, "layer"), (1, 2, 0, "layer"), (1, 2, 3, "x")]:
        assert not torch.equal(first, weight_noise(other, 1, 50, 10))
    everything = torch.cat([weight_noise((1, 2, 3, "x"), i, 20_000, 10) for i in range(1000)])
    assert everything.mean().abs() < 5 / everything.numel() ** 0.5
    assert (everything.std() - 1).abs() < 5 / everything.numel() ** 0.5


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_equals_the_formula_where_a_weight_takes_many_chunks(architecture, small_chunks):
    scores = measured(zo_model(architecture, torch.float64), BATCHES)
    expected = zo_taylor(plain(architecture), scores, BATCHES)
    for name, layer_scores in scores.items():
        error = (layer_scores - expected[name]).abs().max()
        assert error <= 1e-5 * expected[name].max(), name


def test_weights_are_never_touched():
    model = zo_model()
    before = {n: (p, p._version, p.clone()) for n, p in model.named_parameters()}
    measured(model, BATCHES)
    for name, parameter in model.named_parameters():
        same, version, values = before[name]
        assert parameter is same
        assert parameter._version == version
        assert torch.equal(parameter, values)


def test_reference_forwards_are_not_perturbed():
    model = zo_model()
    with torch.no_grad():
        clean = model(**BATCHES[0]).logits
    seen = []

    def with_reference(backward):
        with torch.no_grad(), model.disable_adapter():
            seen.append(model(**BATCHES[0]).logits)
        return model(**BATCHES[0]).loss

    measure_importance(model, [with_reference])
    assert len(seen) == 2 * DIRECTIONS
    assert all(torch.equal(logits, clean) for logits in seen)


def test_a_forward_that_others_have_replaced_is_still_called():
    """accelerate places weights by replacing forwards; the perturbation's output is added there."""
    plain = zo_model(dtype=torch.float64)
    hooked = zo_model(dtype=torch.float64)
    base = hooked.get_base_model().model.layers[0].mlp.up_proj.get_base_layer()
    original, calls = base.forward, []
    base.forward = lambda x: calls.append(1) or original(x)
    expected, scores = measured(plain, BATCHES), measured(hooked, BATCHES)
    assert len(calls) == 2 * DIRECTIONS * len(BATCHES)
    for name in scores:
        error = (scores[name] - expected[name]).abs().max()
        assert error <= 1e-6 * expected[name].max()


def cross_entropy(model, inputs):
    """The loss in the logits' own dtype; transformers computes it in fp32."""
    logits = model(input_ids=inputs["input_ids"]).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), inputs["labels"][:, 1:].flatten()
    )


def test_the_derivative_along_a_direction_is_the_gradients():
    """c = <g, z> over all targeted weights, up to the third derivative times eps^2. GPT-2, whose
    norms compute in fp64 if the model does."""
    model = zo_model("gpt2", torch.float64, zo_eps=1e-5)
    layers = spft_layers(model)
    metric = ZoTaylor(layers, model.peft_config["default"], model)
    with calibration_mode(model, layers, gradients=False), metric.attached(list(layers)):
        for inputs in BATCHES:
            metric.observe(
                CalibrationBatch(lambda backward, inputs=inputs: cross_entropy(model, inputs))
            )
    plain = tiny_model("gpt2", dtype=torch.float64).eval()
    for number, direction, derivative, _ in metric._derivatives:
        plain.zero_grad()
        cross_entropy(plain, BATCHES[number]).backward()
        expected = 0.0
        for name in layers:
            weight = plain.get_submodule(name).weight
            expected += (explicit_noise(number, direction, name, weight) * weight.grad).sum().item()
        assert derivative == pytest.approx(expected, rel=1e-5)


def test_variance_and_a_noisy_ranking_are_reported():
    model = zo_model()
    noisy = measure_importance(model, runs(model, BATCHES))
    assert noisy.diagnostics["directions"] == 9
    assert noisy.diagnostics["gradient_variance"] > 0
    correlations = noisy.diagnostics["rank_correlation"]
    assert set(correlations) == set(noisy.scores)
    assert sorted(correlations.values())[7] < NOISY_RANKING
    assert any("mostly noise: two halves of its 9 directions" in line for line in noisy.warnings)


def test_a_clear_ranking_is_no_warning():
    """One layer whose neurons' gradients differ by far, and many directions."""
    name = "model.layers.1.self_attn.k_proj"
    model = zo_model(target_modules=[name], zo_directions=600)
    layers = spft_layers(model)
    base = layers[name].get_base_layer()
    x, scale = torch.ones(1, 32), torch.arange(16.0) ** 3
    metric = ZoTaylor(layers, model.peft_config["default"], model)
    with metric.attached([name]):
        metric.observe(CalibrationBatch(lambda backward: (base(x) * scale).sum()))
    metric.end_pass()
    assert metric.diagnostics()["rank_correlation"][name] > NOISY_RANKING
    assert metric.warnings() == []


def test_layers_that_are_not_used_are_named():
    """Their estimate is pure noise, not zero."""
    model = zo_model()
    model.get_base_model().model.layers[1].mlp.forward = lambda x: x
    found = measure_importance(model, runs(model, BATCHES))
    assert found.silent_layers == [f"model.layers.1.mlp.{p}_proj" for p in ("gate", "up", "down")]

"""taylor equals sum_j |w_ij gbar_ij| from full autograd gradients: error at most 1e-5 of the
layer's largest score in fp32. Accumulators hold 4 bytes a targeted weight (twice that while
halves are compared), what is alive beside them is at most one layer's weight gradient, and the
result does not depend on where or in how many passes they are kept."""

from __future__ import annotations

import pytest
import torch
from adapters import wrapped
from calibrations import BATCHES, assert_close_to_oracle, measured, runs
from memory import StorageTracker
from oracles import taylor
from peft import get_peft_model
from tiny_models import CONFIGS, few_tokens, tiny_model, wide_model

from trainer_ext import SpftConfig, SpftError, measure_importance
from trainer_ext.importance.metrics import taylor as taylor_module
from trainer_ext.tuner.model import spft_layers


def model_for_taylor(architecture="llama", **fields):
    return wrapped(architecture, importance="taylor", **fields)


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["off", "reentrant", "not"])
@pytest.mark.parametrize("kind", sorted(BATCHES))
@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_equals_the_formula(architecture, kind, checkpointing):
    model = model_for_taylor(architecture)
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    expected = taylor(tiny_model(architecture).eval(), BATCHES[kind])  # eval: no dropout
    assert_close_to_oracle(measured(model, BATCHES[kind]), expected)


def test_signs_cancel_before_the_absolute_value():
    model = model_for_taylor()

    def opposite(backward):
        loss = -model(**BATCHES["plain"][0]).loss
        loss.backward()
        return loss.detach()

    both = [*runs(model, BATCHES["plain"][:1]), opposite]
    one = measured(model, BATCHES["plain"][:1])
    for name, scores in measure_importance(model, both).scores.items():
        assert scores.max() <= 1e-5 * one[name].max()


@pytest.mark.parametrize("fields", [{"accumulator_offload": True}, {"stability": False}])
def test_where_the_sums_are_kept_changes_nothing(fields):
    assert_close_to_oracle(
        measured(model_for_taylor(**fields), BATCHES["plain"]),
        measured(model_for_taylor(), BATCHES["plain"]),
        tolerance=1e-6,
    )


def test_several_passes_give_the_same_bits_and_are_announced(caplog):
    layers = spft_layers(model_for_taylor())
    largest = max(layer.in_features * layer.out_features for layer in layers.values())
    limit = 2 * 4 * 3 * largest / 2**30  # two halves of about three of the fourteen layers
    several = measured(model_for_taylor(accumulator_memory=limit), BATCHES["plain"])
    assert "runs the calibration batches 4 times" in caplog.text
    once = measured(model_for_taylor(), BATCHES["plain"])
    assert all(torch.equal(several[name], once[name]) for name in once)


def test_accumulators_that_the_device_cannot_hold_are_told_in_one_line(monkeypatch):
    def no_room(*args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(taylor_module, "ShardedSums", no_room)
    with pytest.raises(SpftError, match=r"needs 0\.0 GiB on each process for its accumulators"):
        measured(model_for_taylor(), BATCHES["plain"])


def test_a_limit_below_one_layer_is_refused():
    with pytest.raises(SpftError, match=r"accumulator_memory is 1e-09 GiB but layer model\.layers"):
        measured(model_for_taylor(accumulator_memory=1e-9), BATCHES["plain"])


@pytest.mark.parametrize(("stability", "halves"), [(True, 2), (False, 1)])
def test_memory_is_the_accumulators_and_one_layer(stability, halves):
    """Bytes of all tensors that operators make, transients included, above those of group_taylor on
    the same batches. Few tokens, so that the layers' kept inputs (training keeps them as well) are
    small beside a weight."""

    def peak(importance):
        model = get_peft_model(
            wide_model(), SpftConfig(r=4, importance=importance, stability=stability)
        )
        with StorageTracker() as tracker:
            measured(model, few_tokens())
        layers = spft_layers(model).values()
        return tracker.peak_bytes, [layer.in_features * layer.out_features for layer in layers]

    taylor_peak, sizes = peak("taylor")
    accumulators = halves * 4 * sum(sizes)
    extra = taylor_peak - peak("group_taylor")[0]
    assert accumulators <= taylor_peak  # the tracker does see them
    assert extra <= accumulators + 4 * max(sizes)


def test_layers_without_a_gradient_are_named():
    model = model_for_taylor()
    block = model.get_base_model().model.layers[1].mlp
    block.forward = lambda x: x
    found = measure_importance(model, runs(model, BATCHES["plain"]))
    assert found.silent_layers == [f"model.layers.1.mlp.{p}_proj" for p in ("gate", "up", "down")]
    assert any("never reached 3 of the targeted layers" in line for line in found.warnings)

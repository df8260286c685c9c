"""The metrics on the device equal their formulas from full gradients in fp64 on the CPU, on plain,
padded and packed batches, whatever kernels the device computes with.

Tolerances are shares of the layer's largest score. A gradient in fp32 is a sum over some hundred
products, each off by u = 2^-24 of its size, behind a dozen layers: some 100 u = 6e-6 in the worst
case on the CPU. Attention kernels of a GPU sum in another order, out of products that they put
together of several of lower precision: TOLERANCE leaves ten times that. A wrong token, row or
batch changes scores by 1e-2 and more. zo_taylor's scores are off by what the rounding of an fp32
loss explains (`rounding_of_zo_taylor`)."""

from __future__ import annotations

import pytest
from adapters import wrapped
from calibrations import BATCHES, assert_close_to_oracle, measured
from devices import DEVICE
from oracles import (
    ZO_DIRECTIONS,
    ZO_EPS,
    group_taylor,
    rounding_of_zo_taylor,
    taylor,
    wanda,
    zo_taylor,
)
from tiny_models import tiny_model

pytestmark = pytest.mark.cuda

TOLERANCE = 5e-5
ORACLES = {"group_taylor": group_taylor, "taylor": taylor, "wanda": wanda}
ARCHITECTURES = ["llama_bias", "gpt2"]


def plain(architecture="llama"):
    """The same numbers in fp64; in eval mode without dropout."""
    return tiny_model(architecture).double().eval()


@pytest.mark.parametrize("kind", sorted(BATCHES))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("metric", sorted(ORACLES))
def test_a_metric_equals_its_formula(metric, architecture, kind):
    scores = measured(wrapped(architecture, device=DEVICE, importance=metric), BATCHES[kind])
    expected = ORACLES[metric](plain(architecture), BATCHES[kind])
    assert all(layer_scores.device.type == "cpu" for layer_scores in scores.values())
    assert_close_to_oracle(scores, expected, TOLERANCE)


@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "not"])
@pytest.mark.parametrize("metric", ["group_taylor", "taylor"])
def test_checkpointing_changes_nothing(metric, use_reentrant):
    model = wrapped(device=DEVICE, importance=metric)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    expected = ORACLES[metric](plain(), BATCHES["padded"])
    assert_close_to_oracle(measured(model, BATCHES["padded"]), expected, TOLERANCE)


def test_sums_that_are_kept_on_the_host_are_the_same():
    fields = {"importance": "taylor", "accumulator_offload": True}
    scores = measured(wrapped(device=DEVICE, **fields), BATCHES["plain"])
    expected = taylor(plain(), BATCHES["plain"])
    assert_close_to_oracle(scores, expected, TOLERANCE)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_zo_taylor_equals_its_formula_along_the_devices_noise(architecture):
    fields = {"zo_directions": ZO_DIRECTIONS, "zo_eps": ZO_EPS}
    model = wrapped(architecture, device=DEVICE, importance="zo_taylor", **fields)
    scores = measured(model, BATCHES["plain"])
    expected = zo_taylor(plain(architecture), scores, BATCHES["plain"], device=DEVICE)
    rounding = rounding_of_zo_taylor(architecture, scores)
    for name, layer_scores in scores.items():
        assert ((layer_scores - expected[name]).abs() <= rounding[name]).all(), name
        assert rounding[name].max() <= 0.5 * expected[name].max(), name  # else it says nothing

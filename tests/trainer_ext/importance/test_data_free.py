"""magnitude is the sum of squares of a neuron's weights, row by row or column by column as the
layer stores them; random is a function of seed and layer name alone. Neither runs the model."""

from __future__ import annotations

import pytest
import torch
from adapters import wrapped
from oracles import weights
from tiny_models import tiny_model

from trainer_ext import measure_importance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["llama_bias", "gpt2"])
def test_magnitude_equals_the_formula(architecture, dtype):
    scores = measure_importance(wrapped(architecture, dtype, importance="magnitude")).scores
    dense = weights(tiny_model(architecture, dtype=dtype))
    for name, layer_scores in scores.items():
        expected = dense[name].double().pow(2).sum(dim=1)
        # d_in squares in fp32: at most d_in roundings of 2^-24 each
        torch.testing.assert_close(layer_scores, expected, rtol=48 * 2**-24, atol=0)


def test_random_depends_on_seed_and_name_alone():
    first = measure_importance(wrapped(importance="random", seed=1)).scores
    again = measure_importance(
        wrapped(importance="random", seed=1, target_modules=["q_proj"])
    ).scores
    other = measure_importance(wrapped(importance="random", seed=2)).scores
    for name in again:
        assert torch.equal(again[name], first[name])
        assert not torch.equal(other[name], first[name])
    q0, q1 = (first[f"model.layers.{i}.self_attn.q_proj"] for i in (0, 1))
    assert not torch.equal(q0, q1)


@pytest.mark.parametrize("importance", ["magnitude", "random"])
def test_the_model_is_not_run(importance):
    model = wrapped(importance=importance)
    model.get_base_model().forward = None  # a call would fail
    assert measure_importance(model).batches == 0

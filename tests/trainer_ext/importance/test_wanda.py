"""wanda equals sum_j |w_ij| ||x_j|| with norms over all tokens that are not padding: error at most
1e-5 of the layer's largest score. No backward runs and no forward keeps activations; a reference
model's forwards do not count; checkpointing makes no difference."""

from __future__ import annotations

import pytest
import torch
from adapters import wrapped
from calibrations import BATCHES, assert_close_to_oracle, measured, runs
from oracles import wanda
from tiny_models import CONFIGS, batch, tiny_model

from trainer_ext import measure_importance


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["off", "reentrant", "not"])
@pytest.mark.parametrize("kind", sorted(BATCHES))
@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_equals_the_formula(architecture, kind, checkpointing):
    model = wrapped(architecture, importance="wanda")
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    expected = wanda(tiny_model(architecture).eval(), BATCHES[kind])  # eval: no dropout
    assert_close_to_oracle(measured(model, BATCHES[kind]), expected)
    if checkpointing is not None:  # switched off meanwhile, and on again
        assert any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


def test_padding_makes_a_difference():
    """Guards the test above: padded tokens would change the scores by far more than rounding."""
    padded = BATCHES["padded"]
    unmasked = [{**b, "attention_mask": torch.ones_like(b["attention_mask"])} for b in padded]
    with_mask = measured(wrapped(importance="wanda"), padded)
    without = measured(wrapped(importance="wanda"), unmasked)
    name = "model.layers.0.mlp.gate_proj"
    assert (with_mask[name] - without[name]).abs().max() > 0.01 * with_mask[name].max()


def test_a_mask_given_by_position_counts_too():
    inputs = BATCHES["padded"][0]
    model = wrapped(importance="wanda")

    def by_position(backward):
        return model(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"]).loss

    scores = measure_importance(model, [by_position]).scores
    assert_close_to_oracle(scores, wanda(tiny_model(), [inputs]))


def test_no_activation_is_kept_for_a_backward():
    model = wrapped(importance="wanda")
    losses = []

    def run_batch(backward):
        assert not backward
        losses.append(model(**BATCHES["plain"][0]).loss)
        return losses[-1]

    measure_importance(model, [run_batch])
    assert losses[0].grad_fn is None


def test_reference_forwards_without_gradient_do_not_count():
    model = wrapped(importance="wanda")
    plain = measured(model, BATCHES["plain"])

    def with_reference(run_batch):
        def both(backward):
            with torch.no_grad(), model.disable_adapter():
                model(**batch(9))
            return run_batch(backward)

        return both

    got = measure_importance(model, map(with_reference, runs(model, BATCHES["plain"]))).scores
    assert all(torch.equal(got[name], plain[name]) for name in plain)

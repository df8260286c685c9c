"""Runs of the calibration on plain batches, and comparison of its scores with an oracle's."""

from __future__ import annotations

import torch
from tiny_models import batch, packed_batch

from trainer_ext import measure_importance

BATCHES = {
    "plain": [batch(seed) for seed in range(3)],
    "padded": [batch(seed, padding=True) for seed in range(3)],
    "packed": [packed_batch(seed) for seed in range(3)],
}


def runs(model, batches):
    """One callable a batch, on the model's device, as the calibration takes them."""
    for data in batches:
        inputs = {k: v.to(model.device) if torch.is_tensor(v) else v for k, v in data.items()}

        def run_batch(backward, inputs=inputs):
            loss = model(**inputs).loss
            if backward:
                loss.backward()
            return loss.detach()

        yield run_batch


def measured(model, batches):
    return measure_importance(model, runs(model, batches)).scores


def assert_close_to_oracle(scores, expected, tolerance=1e-5):
    """Error at most `tolerance` of the layer's largest score; the head is no target."""
    assert set(scores) == set(expected) - {"lm_head"}
    for name, layer_scores in scores.items():
        error = (layer_scores - expected[name]).abs().max()
        assert error <= tolerance * expected[name].max(), name

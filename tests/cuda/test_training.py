"""On the device, 20 steps of write-through, of the delta forward and of dense training whose
gradients are masked come to the same losses and the same update of the selected rows, with
activation checkpointing of both kinds and without.

Tolerances: the three compute the same sums in other orders, so that a gradient differs by some tens
of u = 2^-24 of its size, and AdamW's step (see `short_runs`) by no more. A step's difference goes
on into the next ones and grows; the same runs on the CPU stay within 2e-6 after 20 steps. Kernels
of a GPU get 50 times that for the update and 1e-5 for a loss. A wrong row or a lost step changes an
update by 1e-2 and more."""

from __future__ import annotations

import pytest
import torch
from devices import DEVICE, far
from short_runs import run_compact, run_dense

pytestmark = pytest.mark.cuda

STEPS = 20
ARCHITECTURES = ["llama_bias", "gpt2"]
_dense: dict[str, tuple] = {}


def dense_run(architecture: str) -> tuple:
    if architecture not in _dense:
        _dense[architecture] = run_dense(architecture, STEPS, DEVICE)
    return _dense[architecture]


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["off", "reentrant", "not"])
@pytest.mark.parametrize("forward", ["auto", "delta"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_run_equals_dense_masked_training(architecture, forward, checkpointing):
    losses, update = run_compact(architecture, forward, STEPS, DEVICE, checkpointing)
    dense_losses, dense_update = dense_run(architecture)
    assert losses[0] > losses[-1]
    torch.testing.assert_close(losses, dense_losses, rtol=1e-5, atol=0)
    assert update.keys() == dense_update.keys()
    for name, delta in update.items():
        assert delta.device.type == DEVICE
        assert far(delta, dense_update[name]) <= 1e-4, name

"""Bytes of the state and of a step's temporaries, measured: 8 an element and 4 a tensor with 32-bit
moments, at most 2.1 an element with 8; a step of fp32 tensors by the fused kernel takes nothing
that grows with them, and of 16-bit ones no more than the copies of one piece."""

from __future__ import annotations

import pytest
import torch
from memory import StorageTracker
from optimizers import compact, drive, set_gradients, state_of

from trainer_ext import SelectedNeuronAdamW
from trainer_ext.optim import half
from trainer_ext.report.figures import optimizer_state_bytes

# fp32 copies of parameter and gradient at first; then the parameter's, int32 draws, and a mask and
# bf16 nothing: 4 + 4 + 1. The larger is 9; counters and scalars are a few hundred bytes.
HALF_BYTES = 9
SMALL = 4096


def storages(optimizer) -> int:
    """Bytes of the distinct storages behind the state, so that no view hides a larger one."""
    found = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for state in state_of(optimizer)
        for t in state.values()
    }
    return sum(found.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_32bit_state_is_8_bytes_an_element(dtype):
    parameters = compact(dtype)
    optimizer = SelectedNeuronAdamW(parameters)
    drive(optimizer, 1)
    expected = sum(8 * p.numel() + 4 for p in parameters)
    assert storages(optimizer) == optimizer_state_bytes(optimizer) == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(64, 64), (3, 1500), (1, 4097)])
def test_8bit_state_is_at_most_2_1_bytes_an_element(dtype, shape):
    parameters = compact(dtype, shapes=[shape])
    optimizer = SelectedNeuronAdamW(parameters, state_bits=8)
    drive(optimizer, 1)
    assert storages(optimizer) == optimizer_state_bytes(optimizer)
    assert storages(optimizer) <= 2.1 * parameters[0].numel()


def test_small_tensors_keep_32bit_moments():
    parameters = compact(shapes=[(1, 4095)])
    optimizer = SelectedNeuronAdamW(parameters, state_bits=8)
    drive(optimizer, 1)
    assert storages(optimizer) == 8 * 4095 + 4


def peak_of_a_step(parameters, **mode) -> int:
    optimizer = SelectedNeuronAdamW(parameters, **mode)
    drive(optimizer, 1)  # makes the state
    set_gradients(parameters, 1)
    with StorageTracker() as tracker:
        optimizer.step()
    return tracker.peak_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fused_step_of_full_precision_takes_nothing(dtype):
    assert peak_of_a_step(compact(dtype, shapes=[(256, 256)] * 4)) <= SMALL


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "shapes", [[(64, 64)] * 12, [(768, 64)], [(100, 64), (500, 64), (168, 64)]]
)
def test_a_step_of_half_precision_takes_the_copies_of_one_piece(monkeypatch, dtype, shapes):
    """Twelve pieces' worth of elements in many small tensors, in one large, and in ragged ones."""
    monkeypatch.setattr(half, "PIECE_ELEMENTS", 4096)
    peak = peak_of_a_step(compact(dtype, shapes=shapes))
    assert 8 * 4096 <= peak <= HALF_BYTES * 4096 + SMALL


def test_an_8bit_step_of_fp32_is_bounded_by_a_piece_too(monkeypatch):
    """bitsandbytes' CPU kernel makes some fp32 copies of what it is given; a GPU's makes none."""
    monkeypatch.setattr(half, "PIECE_ELEMENTS", 4096)
    peaks = [peak_of_a_step(compact(shapes=[(r, 64)]), state_bits=8) for r in (128, 1024)]
    assert peaks[0] == peaks[1] <= 32 * 4096 + SMALL

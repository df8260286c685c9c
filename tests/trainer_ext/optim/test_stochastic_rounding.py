"""Stochastic rounding to bf16: one of the two neighbours, in the mean the value itself, the same
bits for the same key, and nothing else touched. Updates too small for bf16 are kept in the mean,
which rounding to nearest loses.

Bounds on means: N independent draws with values in an interval of width w have a mean within
w sqrt(ln(2 / p) / (2 N)) of the expectation but with probability p (Hoeffding); p is 1e-9 here, and
the draws are a fixed function of their keys, so a test that passes once passes always."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizers import compact, same_bits
from torch import nn

from trainer_ext import SelectedNeuronAdamW
from trainer_ext.optim.half import (
    random_bits,
    round_stochastically_,
    write_back_,
)
from trainer_ext.tuner.marks import mark_trained

DRAWS = 2**16


def hoeffding(width, draws: int):
    return width * math.sqrt(math.log(2e9) / (2 * draws))


def rounded(values: torch.Tensor, key: tuple = (0, 1, 0, 0)) -> torch.Tensor:
    target = torch.empty(values.shape, dtype=torch.bfloat16)
    round_stochastically_(target, values.clone(), key)
    return target


def neighbours(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The bf16 numbers just below and above finite fp32 values, or both the value itself."""
    nearest = values.to(torch.bfloat16)
    infinity = torch.full_like(nearest, torch.inf)
    up = torch.where(nearest.float() >= values, nearest, torch.nextafter(nearest, infinity))
    down = torch.where(nearest.float() <= values, nearest, torch.nextafter(nearest, -infinity))
    return down, up


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40)
)
@settings(max_examples=200, deadline=None)
def test_only_the_two_neighbours_occur(numbers):
    values = torch.tensor(numbers)
    down, up = neighbours(values)
    for step in range(5):
        result = rounded(values, (0, step, 0, 0))
        assert ((result == down) | (result == up)).all()


@pytest.mark.parametrize("value", [1.0 + 2**-9, 1.0 + 2**-20, -3.1415927, 1e-30, -1e-39, 65535.7])
def test_the_mean_is_the_value(value):
    """Also of subnormal numbers, where bf16's spacing is fixed."""
    values = torch.full((DRAWS,), value)
    down, up = (t[0].double() for t in neighbours(values))
    mean = rounded(values).double().mean()
    assert abs(mean - values[0].double()) <= hoeffding(up - down, DRAWS)
    assert down < up


def test_exact_and_non_finite_values_stay():
    special = torch.tensor([torch.inf, -torch.inf, 0.0, -0.0, 1.0, -2.5, 2.0**-133, 3.3895e38])
    special[-1] = torch.finfo(torch.bfloat16).max
    values = special.repeat(DRAWS // 8)
    result = rounded(values).float()
    assert torch.equal(result.view(torch.int32), values.view(torch.int32))
    payloads = torch.tensor([0x7F800001, 0x7FFFFFFF, 0x7FC00000, -1, -0x7FFFFF], dtype=torch.int32)
    nans = payloads.view(torch.float32).repeat(DRAWS // 8)
    assert nans.isnan().all()
    assert rounded(nans).isnan().all()


def test_bits_are_a_function_of_the_key_and_nothing_else():
    shape = torch.Size([4096])
    cpu = torch.device("cpu")
    keys = [(0, 1, 0, 0), (1, 1, 0, 0), (0, 2, 0, 0), (0, 1, 1, 0), (0, 1, 0, 4096)]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    draws = [random_bits(shape, key, cpu) for key in keys]
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    for i, key in enumerate(keys):
        assert torch.equal(random_bits(shape, key, cpu), draws[i])
        assert all(not torch.equal(draws[i], other) for other in draws[i + 1 :])
    for bits in draws:
        assert bits.min() >= 0
        assert bits.max() < 2**16
        # each of the 16 bits is 1 in half of the draws
        for k in range(16):
            share = ((bits >> k) & 1).double().mean()
            assert abs(share - 0.5) <= hoeffding(1.0, bits.numel())


def test_fp16_and_what_is_not_asked_for_round_to_nearest():
    values = torch.randn(1000)
    for dtype, stochastic in ((torch.float16, True), (torch.bfloat16, False)):
        target = torch.empty(1000, dtype=dtype)
        write_back_(target, values.clone(), (0, 1, 0, 0), stochastic)
        assert torch.equal(target, values.to(dtype))


@pytest.mark.parametrize("state_bits", [32, 8])
def test_tiny_updates_survive_in_the_mean(state_bits):
    """100 steps of 2^-14 from 1, where bf16 has steps of 2^-7 above it: to nearest nothing moves.

    The rounding of different steps adds up as a martingale whose differences are below 2^-7, the
    mean over the elements of one tensor within Hoeffding's bound of 100 such draws an element.
    """
    steps, lr = 100, 2.0**-14
    results = {}
    for stochastic in (True, False):
        parameter = nn.Parameter(torch.ones(DRAWS, dtype=torch.bfloat16))
        mark_trained(parameter)
        optimizer = SelectedNeuronAdamW(
            [parameter],
            lr=lr,
            weight_decay=0.0,
            eps=1e-12,
            state_bits=state_bits,
            stochastic_rounding=stochastic,
        )
        for _ in range(steps):
            parameter.grad = torch.full_like(parameter, -1.0)  # every update is +lr
            optimizer.step()
        results[stochastic] = parameter.detach().double()
    assert torch.equal(results[False], torch.ones(DRAWS, dtype=torch.float64))
    moved = results[True].mean() - 1
    # the update itself: 8-bit moments of equal elements are exact but for rounding (1e-5)
    bound = hoeffding(2.0**-7 * math.sqrt(steps), DRAWS) + 1e-4 * steps * lr
    assert abs(moved - steps * lr) <= bound
    assert bound < 0.2 * steps * lr


def test_steps_seeds_and_positions_draw_differently():
    """Equal parameters of one optimizer are rounded differently, and so under another seed."""
    runs = []
    for seed in (0, 0, 1):
        parameters = compact(torch.bfloat16, shapes=[(64, 64)]) + compact(
            torch.bfloat16, shapes=[(64, 64)]
        )
        optimizer = SelectedNeuronAdamW(parameters, lr=1e-4, seed=seed)
        for p in parameters:
            p.grad = torch.ones_like(p)
        optimizer.step()
        runs.append(parameters)
    assert same_bits(runs[0], runs[1])
    assert not torch.equal(runs[0][0], runs[2][0])
    assert not torch.equal(runs[0][0], runs[0][1])

"""On the device, SelectedNeuronAdamW has the bits of torch.optim.AdamW with the same kernel; with
16-bit parameters those of its twin, and those of torch's kernel on an fp32 copy that is rounded
after each step; under a GradScaler those of a run without one, but for the steps that overflow.

No tolerance. torch's and ours call one kernel on the same numbers. The twin's operators are those
of torch's for-loop kernel, one by one on tensors of the same size, so that a device computes and
contracts them alike; the random bits are a function of key and device. Scales are powers of two,
by which fp32 numbers are multiplied and divided exactly."""

from __future__ import annotations

import copy

import pytest
import torch
from adamw_reference import SelectedNeuronAdamWReference
from devices import DEVICE
from optimizers import (
    assert_driven_to_the_same_bits,
    compact,
    drive,
    same_bits,
    set_gradients,
    state_of,
)

from trainer_ext import SelectedNeuronAdamW

pytestmark = pytest.mark.cuda

STEPS = 20
KERNELS = [{"foreach": True}, {"fused": True}, {"foreach": False}]
every_kernel = pytest.mark.parametrize("kernel", KERNELS, ids=["foreach", "fused", "loop"])


def parameters(dtype=torch.float32) -> list[torch.nn.Parameter]:
    return compact(dtype, device=DEVICE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@every_kernel
def test_full_precision_has_the_bits_of_torch(dtype, kernel):
    ours, theirs = parameters(dtype), parameters(dtype)
    optimizer, expected = SelectedNeuronAdamW(ours, **kernel), torch.optim.AdamW(theirs, **kernel)
    assert_driven_to_the_same_bits(optimizer, expected, STEPS)
    assert not same_bits(ours, parameters(dtype))
    assert all(p.device.type == DEVICE for p in ours)


def test_the_fused_kernel_is_the_default():
    ours, theirs = parameters(), parameters()
    optimizer = SelectedNeuronAdamW(ours)
    drive(optimizer, STEPS)
    drive(torch.optim.AdamW(theirs, fused=True), STEPS)
    assert same_bits(ours, theirs)
    assert {s["step"].device.type for s in state_of(optimizer)} == {DEVICE}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stochastic", [True, False], ids=["stochastic", "nearest"])
def test_half_precision_has_the_bits_of_the_twin(dtype, stochastic):
    ours, twins = parameters(dtype), parameters(dtype)
    options = {"stochastic_rounding": stochastic, "seed": 7}
    optimizer = SelectedNeuronAdamW(ours, foreach=False, **options)
    twin = SelectedNeuronAdamWReference(twins, **options)
    assert_driven_to_the_same_bits(optimizer, twin, STEPS)
    assert {s["exp_avg"].dtype for s in state_of(optimizer)} == {torch.float32}
    assert {s["step"].device.type for s in state_of(optimizer)} == {"cpu"}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_kernel
def test_half_precision_is_torchs_kernel_in_fp32_rounded(dtype, kernel):
    ours = parameters(dtype)
    optimizer = SelectedNeuronAdamW(ours, stochastic_rounding=False, **kernel)
    wide = [torch.nn.Parameter(p.detach().float()) for p in ours]
    expected = torch.optim.AdamW(wide, **kernel)
    for step in range(STEPS):
        drive(optimizer, 1, step)
        for p, q in zip(ours, wide, strict=True):
            q.grad = p.grad.float()
        expected.step()
        with torch.no_grad():
            for p, q in zip(ours, wide, strict=True):
                q.copy_(q.to(dtype))
                assert torch.equal(p.float(), q)
    for mine, its in zip(state_of(optimizer), state_of(expected), strict=True):
        assert torch.equal(mine["exp_avg_sq"], its["exp_avg_sq"])


@every_kernel
def test_stochastic_rounding_is_one_of_the_two_neighbours_and_right_in_the_mean(kernel):
    """Against fp32 parameters that take the same first step. N draws within a spacing w have a mean
    within w sqrt(ln(2 / p) / (2 N)) of the expectation, but with probability p = 1e-9
    (Hoeffding); the draws are a function of the seed alone."""
    ours = compact(torch.bfloat16, shapes=((512, 128),), device=DEVICE)
    exact = [torch.nn.Parameter(p.detach().float()) for p in ours]
    drive(SelectedNeuronAdamW(ours, **kernel), 1)
    for p, q in zip(ours, exact, strict=True):
        q.grad = p.grad.float()
    torch.optim.AdamW(exact, **kernel).step()
    got, wanted = (p[0].detach().cpu().double() for p in (ours, exact))
    spacing = 2.0 ** (torch.maximum(got.abs(), wanted.abs()).log2().floor() - 7)
    share = (got - wanted) / spacing
    assert share.abs().max() < 1
    assert share.mean().abs() <= (21.5 / (2 * share.numel())) ** 0.5
    assert not torch.equal(got, wanted.bfloat16().double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_loaded_state_goes_on_alike(dtype):
    ours, resumed = parameters(dtype), parameters(dtype)
    optimizer = SelectedNeuronAdamW(ours)
    drive(optimizer, STEPS // 2)
    saved = copy.deepcopy(optimizer.state_dict())
    for p, q in zip(ours, resumed, strict=True):
        q.data.copy_(p)
    for state in saved["state"].values():  # as torch.load(map_location="cpu") gives it
        state |= {key: value.cpu() for key, value in state.items()}
    other = SelectedNeuronAdamW(resumed)
    other.load_state_dict(saved)
    drive(optimizer, STEPS // 2, STEPS // 2)
    drive(other, STEPS // 2, STEPS // 2)
    assert same_bits(ours, resumed)
    assert same_bits(state_of(optimizer), state_of(other))


@pytest.mark.parametrize("kernel", [{}, *KERNELS], ids=["default", "foreach", "fused", "loop"])
def test_grad_scaler_unscales_exactly_and_skips_what_overflows(kernel):
    scaled, plain = parameters(), parameters()
    optimizer, expected = (
        SelectedNeuronAdamW(scaled, **kernel),
        SelectedNeuronAdamW(plain, **kernel),
    )
    scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0)
    scaler.scale(torch.zeros((), device=DEVICE))  # starts the scaler
    overflowing = 7
    for step in range(STEPS):
        set_gradients(scaled, step)
        for p in scaled:
            p.grad *= scaler.get_scale()
        if step == overflowing:
            scaled[0].grad[0, 0] = torch.inf
        else:
            drive(expected, 1, step)
        scaler.step(optimizer)
        scaler.update()
        assert same_bits(scaled, plain)
    assert scaler.get_scale() == 512.0
    assert same_bits(state_of(optimizer), state_of(expected))
    assert {float(s["step"]) for s in state_of(optimizer)} == {STEPS - 1}

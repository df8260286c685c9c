"""Steps of SelectedNeuronAdamW: bit for bit torch.optim.AdamW's where torch computes the same, and
bitsandbytes' AdamW8bit's; the reference twin's everywhere; and what every optimizer must do.

Tolerances: one step of two orders of the same sums differs by a few units in the last place of the
update, which is at most lr / (1 - beta1) each; 100 steps stay within 1e-6 at lr 1e-3. A moment in
8 bits may be rounded to the next code, so its twin is set to the same state before each step."""

from __future__ import annotations

import copy
import pickle

import bitsandbytes
import pytest
import torch
from adamw_reference import SelectedNeuronAdamWReference
from optimizers import (
    SHAPES,
    assert_driven_to_the_same_bits,
    compact,
    drive,
    same_bits,
    set_gradients,
    state_of,
)
from torch.optim.lr_scheduler import LinearLR

from trainer_ext import SelectedNeuronAdamW
from trainer_ext.optim import half
from trainer_ext.optim.block_8bit import codebooks

STEPS = 100
KERNELS = [{"foreach": True}, {"fused": True}, {"foreach": False}, {"fused": False}]
MODES = [
    *[(torch.float32, kernel) for kernel in [*KERNELS, {}]],
    (torch.float64, {}),
    (torch.bfloat16, {}),
    (torch.bfloat16, {"foreach": True}),
    (torch.float16, {}),
    (torch.float32, {"state_bits": 8}),
    (torch.bfloat16, {"state_bits": 8}),
]


def _name(value) -> str:
    if isinstance(value, dict):
        return "_".join(f"{key}={v}" for key, v in value.items()) or "default"
    return str(value).removeprefix("torch.")


def _spacing(codebook: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
    """The larger of the distances from what a code stands for to its neighbours."""
    gaps = torch.nn.functional.pad(codebook.diff(), (1, 1))
    return torch.maximum(gaps[:-1], gaps[1:])[codes.long()]


every_mode = pytest.mark.parametrize(("dtype", "mode"), MODES, ids=_name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", KERNELS, ids=_name)
def test_full_precision_has_the_bits_of_torch(dtype, kernel):
    ours, theirs = compact(dtype), compact(dtype)
    optimizer, expected = SelectedNeuronAdamW(ours, **kernel), torch.optim.AdamW(theirs, **kernel)
    assert_driven_to_the_same_bits(optimizer, expected, STEPS)
    assert not same_bits(ours, compact(dtype))


def test_the_fused_kernel_is_the_default_on_plain_tensors():
    ours, theirs = compact(), compact()
    drive(SelectedNeuronAdamW(ours), STEPS)
    drive(torch.optim.AdamW(theirs, fused=True), STEPS)
    assert same_bits(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kernel", [*KERNELS, {}], ids=_name)
def test_full_precision_agrees_with_the_reference(dtype, kernel):
    ours, twins = compact(dtype), compact(dtype)
    drive(SelectedNeuronAdamW(ours, **kernel), STEPS)
    drive(SelectedNeuronAdamWReference(twins), STEPS)
    for a, b in zip(ours, twins, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6 if dtype == torch.float32 else 1e-14)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stochastic", [True, False])
def test_half_precision_has_the_bits_of_the_reference(dtype, stochastic):
    """The for-loop kernel, because its sums are in the twin's order."""
    ours, twins = compact(dtype), compact(dtype)
    options = {"stochastic_rounding": stochastic, "seed": 7}
    optimizer = SelectedNeuronAdamW(ours, foreach=False, **options)
    twin = SelectedNeuronAdamWReference(twins, **options)
    assert_driven_to_the_same_bits(optimizer, twin, STEPS)
    assert {s["exp_avg"].dtype for s in state_of(optimizer)} == {torch.float32}


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pieces_change_nothing_but_the_random_bits(monkeypatch, state_bits, dtype):
    """Tensors cut in pieces and put in several buckets: the twin with the same cuts, to the bit."""
    monkeypatch.setattr(half, "PIECE_ELEMENTS", 1024)
    ours, twins, whole = compact(dtype), compact(dtype), compact(dtype)
    optimizer = SelectedNeuronAdamW(ours, foreach=False, state_bits=state_bits)
    twin = SelectedNeuronAdamWReference(twins, state_bits=state_bits)
    drive(optimizer, 3)
    drive(twin, 3)
    monkeypatch.undo()
    drive(SelectedNeuronAdamW(whole, foreach=False, state_bits=state_bits), 3)
    if state_bits == 32:
        assert same_bits(ours, twins)
    if dtype == torch.float32:
        assert same_bits(ours, whole)
    else:
        assert not same_bits(ours, whole)


def test_8bit_has_the_bits_of_bitsandbytes():
    """Tensors below 4096 elements have fp32 moments in both; bitsandbytes sums in another order."""
    ours, theirs = compact(), compact()
    optimizer = SelectedNeuronAdamW(ours, state_bits=8)
    expected = bitsandbytes.optim.AdamW8bit(theirs, weight_decay=1e-2)
    drive(optimizer, STEPS)
    drive(expected, STEPS)
    for a, b, mine, its in zip(ours, theirs, state_of(optimizer), state_of(expected), strict=True):
        if a.numel() < 4096:
            torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
            continue
        names = {"exp_avg": "state1", "exp_avg_sq": "state2"}
        names |= {"exp_avg_absmax": "absmax1", "exp_avg_sq_absmax": "absmax2"}
        assert torch.equal(a, b)
        assert all(torch.equal(mine[name], its[other]) for name, other in names.items())
        assert mine["step"] == its["step"] == STEPS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_8bit_agrees_with_the_reference_step_by_step(dtype):
    ours, twins = compact(dtype), compact(dtype)
    optimizer = SelectedNeuronAdamW(ours, state_bits=8)
    twin = SelectedNeuronAdamWReference(twins, state_bits=8)
    for step in range(STEPS):
        for a, b in zip(ours, twins, strict=True):
            b.data.copy_(a)
            twin.state[b] = copy.deepcopy(dict(optimizer.state[a]))
        drive(optimizer, 1, step)
        drive(twin, 1, step)
        for a, b, mine, its in zip(ours, twins, state_of(optimizer), state_of(twin), strict=True):
            # fp32: some units in the last place; bf16: now and then the other neighbour (2^-8)
            torch.testing.assert_close(a, b, rtol=0 if dtype == torch.float32 else 2**-7, atol=1e-7)
            for moment, codebook in zip(
                ("exp_avg", "exp_avg_sq"), codebooks(a.device), strict=True
            ):
                x, y = mine[moment], its[moment]
                if x.dtype == torch.uint8:
                    # the next code where rounding differs, or the one after it: the quantiser
                    # takes a neighbour of the nearest code at times; codes near 0 are closer than
                    # the rounding of the sums
                    bound = 2 * _spacing(codebook, x) + 8 * 2**-24
                    assert ((codebook[x.long()] - codebook[y.long()]).abs() <= bound).all()
                    assert (x != y).float().mean() <= 1e-2
                else:
                    torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-9)


@every_mode
def test_every_step_grows_the_version(dtype, mode):
    parameters = compact(dtype)
    optimizer = SelectedNeuronAdamW(parameters, **mode)
    for step in range(2):
        before = [p._version for p in parameters]
        drive(optimizer, 1, step)
        assert all(p._version > v for p, v in zip(parameters, before, strict=True))


@every_mode
def test_parameters_without_a_gradient_stay(dtype, mode):
    parameters = compact(dtype)
    optimizer = SelectedNeuronAdamW(parameters, **mode)
    set_gradients(parameters, 0)
    parameters[2].grad = None
    before, version = parameters[2].detach().clone(), parameters[2]._version
    optimizer.step()
    assert torch.equal(parameters[2], before)
    assert parameters[2]._version == version
    assert parameters[2] not in optimizer.state
    optimizer.zero_grad()
    assert all(p.grad is None for p in parameters)


@every_mode
@pytest.mark.parametrize("how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_copies_go_on_alike(dtype, mode, how):
    parameters = compact(dtype)
    optimizer = SelectedNeuronAdamW(parameters, **mode)
    drive(optimizer, 2)
    twin, copies = how((optimizer, parameters))
    drive(optimizer, 2, 2)
    drive(twin, 2, 2)
    assert same_bits(parameters, copies)
    assert same_bits(state_of(optimizer), state_of(twin))


@every_mode
def test_other_random_numbers_are_neither_used_nor_moved(dtype, mode):
    results = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        parameters = compact(dtype)
        drive(SelectedNeuronAdamW(parameters, **mode), 2)
        assert torch.equal(torch.get_rng_state(), before)
        results.append(parameters)
    assert same_bits(*results)


def test_dtypes_may_be_mixed_in_a_group():
    """Full and half precision in turn: the twin's bits, whose positions count all parameters."""

    def mixed():
        kinds = [compact(torch.float32), compact(torch.bfloat16), compact(torch.float16)]
        return [parameter for alike in zip(*kinds, strict=True) for parameter in alike]

    optimizer = SelectedNeuronAdamW(mixed(), foreach=False)
    assert_driven_to_the_same_bits(optimizer, SelectedNeuronAdamWReference(mixed()), 5)
    assert list(optimizer.state_dict()["state"]) == list(range(12))


def test_hooks_are_called_once():
    """Also where torch has wrapped the step of torch.optim.AdamW, at an instance of that."""
    torch.optim.AdamW(compact())
    optimizer, calls = SelectedNeuronAdamW(compact()), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    drive(optimizer, 1)
    assert calls == ["before", "after"]


def test_a_failed_step_leaves_the_groups():
    optimizer = SelectedNeuronAdamW(compact(), foreach=True)
    groups = optimizer.param_groups
    groups[0]["lr"] = torch.tensor(0.1)
    with pytest.raises(RuntimeError, match="lr as a Tensor"):
        drive(optimizer, 1)
    assert optimizer.param_groups is groups


def test_decay_pulls_the_delta_to_zero():
    """Without a gradient's push, theta shrinks by 1 - lr * weight_decay a step."""
    parameters = compact()
    optimizer = SelectedNeuronAdamW(parameters, lr=0.1, weight_decay=0.5)
    expected = [p.detach().double() * (1 - 0.1 * 0.5) ** 10 for p in parameters]
    for _ in range(10):
        for p in parameters:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    for p, e in zip(parameters, expected, strict=True):
        torch.testing.assert_close(p.double(), e, rtol=1e-6, atol=0)


@pytest.mark.parametrize("lr", [0.1, torch.tensor(0.1)])
def test_groups_schedulers_and_tensor_rates(lr):
    """Two groups of other hyperparameters under a schedule, as torch's AdamW."""
    runs = []
    for kind in (SelectedNeuronAdamW, torch.optim.AdamW):
        parameters = compact()
        groups = [
            {"params": parameters[:1], "betas": (0.5, 0.9), "eps": 1e-3},
            {"params": parameters[1:], "weight_decay": 0.3},
        ]
        optimizer = kind(groups, lr=copy.copy(lr), fused=True)
        schedule = LinearLR(optimizer, start_factor=0.1, total_iters=5)
        for step in range(8):
            drive(optimizer, 1, step)
            schedule.step()
        runs.append(parameters)
    assert same_bits(*runs)


@every_mode
def test_closure_clipping_and_accumulation(dtype, mode):
    """A quadratic loss, in two backwards a step and clipped, falls to a tenth; the closure's value
    comes back."""
    parameters = compact(dtype)
    optimizer = SelectedNeuronAdamW(parameters, lr=1e-2, **mode)

    def loss():
        return sum(p.double().square().sum() for p in parameters)

    def closure():
        optimizer.zero_grad()
        total = loss()
        for _ in range(2):
            (loss() / 2).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        return total

    start = loss().item()
    values = [optimizer.step(closure).item() for _ in range(40)]
    assert values[0] == start
    assert loss() < 0.1 * start


@pytest.mark.parametrize("mode", [{}, {"fused": True}, {"state_bits": 8}], ids=_name)
def test_grad_scaler_unscales_and_skips(mode):
    """Scaled by a power of two, gradients come to the same bits; an overflow skips the step."""
    scaled, plain = compact(), compact()
    optimizer, expected = SelectedNeuronAdamW(scaled, **mode), SelectedNeuronAdamW(plain, **mode)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(torch.zeros(()))  # starts the scaler
    for step in range(3):
        set_gradients(scaled, step)
        for p in scaled:
            p.grad *= 1024.0
        scaler.step(optimizer)
        scaler.update()
        drive(expected, 1, step)
    assert same_bits(scaled, plain)
    set_gradients(scaled, 3)
    scaled[0].grad[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert same_bits(scaled, plain)


def test_layouts_of_gradient_and_parameter_may_differ():
    """Transposed views on either side, fp32, bf16 and 8-bit: as contiguous ones."""
    for dtype, mode in (
        (torch.float32, {}),
        (torch.bfloat16, {}),
        (torch.float32, {"state_bits": 8}),
    ):
        plain = compact(dtype, shapes=[(64, 96)])
        turned = [torch.nn.Parameter(plain[0].detach().t().contiguous().t()) for _ in range(2)]
        turned[1].data = plain[0].detach().clone()
        turned[0]._spft_trained = turned[1]._spft_trained = True
        optimizers = [SelectedNeuronAdamW([p], **mode) for p in (plain[0], *turned)]
        for step in range(3):
            set_gradients(plain, step)
            turned[0].grad = plain[0].grad.clone()
            turned[1].grad = plain[0].grad.t().contiguous().t()
            for optimizer in optimizers:
                optimizer.step()
        assert not turned[0].is_contiguous()
        for p in turned:
            torch.testing.assert_close(p, plain[0], rtol=0, atol=1e-7)


def test_shapes_hold_small_and_large_tensors():
    sizes = [torch.Size(shape).numel() for shape in SHAPES]
    assert min(sizes) < 4096 < max(sizes)
    assert any(size > 4096 and size % 256 for size in sizes)

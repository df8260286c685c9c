"""State dicts: through a file they keep every bit and dtype; an interrupted run goes on bit for
bit; with 32-bit moments they go to and from torch.optim.AdamW. What does not fit is refused, and
the optimizer is as it was then."""

from __future__ import annotations

import io

import pytest
import torch
from optimizers import compact, drive, same_bits, state_of

from trainer_ext import SelectedNeuronAdamW, SpftError

MODES = [
    (torch.float32, {}),
    (torch.float32, {"fused": True}),
    (torch.float32, {"foreach": True}),
    (torch.float64, {}),
    (torch.bfloat16, {}),
    (torch.float16, {}),
    (torch.float32, {"state_bits": 8}),
    (torch.bfloat16, {"state_bits": 8}),
]
every_mode = pytest.mark.parametrize(("dtype", "mode"), MODES, ids=str)


def saved(optimizer) -> dict:
    """The state dict as it comes back from a file."""
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_mode
def test_an_interrupted_run_goes_on_bit_for_bit(dtype, mode):
    whole, first = compact(dtype), compact(dtype)
    undisturbed = SelectedNeuronAdamW(whole, seed=3, lr=3e-3, **mode)
    drive(undisturbed, 8)
    interrupted = SelectedNeuronAdamW(first, seed=3, lr=3e-3, **mode)
    drive(interrupted, 5)
    state = saved(interrupted)
    second = compact(dtype)
    for a, b in zip(second, first, strict=True):
        a.data.copy_(b)
    resumed = SelectedNeuronAdamW(second, seed=3, **mode)  # the rate is the saved one
    resumed.load_state_dict(state)
    assert same_bits(state_of(resumed), state_of(interrupted))
    drive(resumed, 3, 5)
    assert same_bits(second, whole)
    assert same_bits(state_of(resumed), state_of(undisturbed))


@every_mode
def test_dtypes_are_kept(dtype, mode):
    optimizer = SelectedNeuronAdamW(compact(dtype), **mode)
    drive(optimizer, 1)
    fresh = SelectedNeuronAdamW(compact(dtype), **mode)
    fresh.load_state_dict(saved(optimizer))
    moments = torch.float64 if dtype == torch.float64 else torch.float32
    for state in state_of(fresh):
        quantised = "state_bits" in mode and state["exp_avg"].numel() >= 4096
        assert state["exp_avg"].dtype == (torch.uint8 if quantised else moments)
        assert state["step"].dtype == torch.float32
        assert ("exp_avg_absmax" in state) == quantised


def test_loading_does_not_share_memory_with_what_was_loaded():
    optimizer, fresh = SelectedNeuronAdamW(compact()), SelectedNeuronAdamW(compact())
    drive(optimizer, 1)
    fresh.load_state_dict(optimizer.state_dict())
    before = [state["exp_avg"].clone() for state in state_of(optimizer)]
    drive(fresh, 1, 1)
    assert same_bits([state["exp_avg"] for state in state_of(optimizer)], before)
    assert all(state["step"] == 1 for state in state_of(optimizer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("to_torch", [True, False])
@pytest.mark.parametrize(
    "kernel", [{"fused": True}, {"foreach": True}, {"foreach": False}], ids=str
)
def test_state_goes_both_ways_with_torch(dtype, to_torch, kernel):
    kinds = [SelectedNeuronAdamW, torch.optim.AdamW]
    first, second = kinds if to_torch else kinds[::-1]
    whole, parameters = compact(dtype), compact(dtype)
    drive(torch.optim.AdamW(whole, weight_decay=0.2, **kernel), 8)
    begun = first(parameters, weight_decay=0.2, **kernel)
    drive(begun, 5)
    going_on = second(parameters, **kernel)
    going_on.load_state_dict(saved(begun))
    assert going_on.param_groups[0]["weight_decay"] == 0.2
    drive(going_on, 3, 5)
    assert same_bits(parameters, whole)
    if not to_torch:
        group = going_on.param_groups[0]
        assert (group["state_bits"], group["seed"], group["stochastic_rounding"]) == (32, 0, True)


def test_bf16_moments_of_torch_become_fp32():
    theirs, ours = compact(torch.bfloat16), compact(torch.bfloat16)
    begun, going_on = torch.optim.AdamW(theirs), SelectedNeuronAdamW(ours)
    drive(begun, 2)
    going_on.load_state_dict(saved(begun))
    for mine, its in zip(state_of(going_on), state_of(begun), strict=True):
        assert mine["exp_avg"].dtype == torch.float32
        assert torch.equal(mine["exp_avg"], its["exp_avg"].float())
    drive(going_on, 1, 2)


def test_the_kernel_stays_the_optimizers_own():
    """A run may go on elsewhere: a checkpoint of one kernel does not choose it there."""
    begun = SelectedNeuronAdamW(compact(), foreach=True)
    drive(begun, 1)
    going_on = SelectedNeuronAdamW(compact(), fused=True)
    going_on.load_state_dict(saved(begun))
    assert going_on.param_groups[0]["fused"] is True
    assert going_on.param_groups[0]["foreach"] is None
    drive(going_on, 1, 1)


def test_hooks_of_others_see_the_whole_state():
    begun = SelectedNeuronAdamW(compact())
    drive(begun, 1)
    fresh, seen = SelectedNeuronAdamW(compact()), []
    fresh.register_load_state_dict_pre_hook(lambda _, d: seen.append(len(d["state"])))
    fresh.register_load_state_dict_post_hook(lambda o: seen.append(len(o.state)))
    for _ in range(2):
        fresh.load_state_dict(begun.state_dict())
    assert seen == [4, 4, 4, 4]


def _other(mode, shapes=None, **changes):
    parameters = compact(shapes=shapes) if shapes else compact()
    optimizer = SelectedNeuronAdamW(parameters, **mode)
    drive(optimizer, 1)
    return {**saved(optimizer), **changes}


def _foreign_state():
    parameters = compact()
    optimizer = torch.optim.Adagrad(parameters)
    drive(optimizer, 1)
    return saved(optimizer)


EIGHT = {"state_bits": 8}
MORE = ((1, 8), (6, 32), (64, 96), (3, 1500))
LARGER = ((1, 8), (4, 32), (80, 96), (3, 1500))
REFUSED = {
    "another number of neurons": (
        {},
        lambda: _other({}, MORE),
        ["exp_avg of parameter 1", "(6, 32)", "(4, 32)", "number of neurons"],
    ),
    "another number, 8-bit": (EIGHT, lambda: _other(EIGHT, LARGER), ["(80, 96)", "(64, 96)"]),
    "32 bits into 8": (
        EIGHT,
        lambda: _other({}),
        ["state_bits is 8", "checkpoint's optimizer is 32"],
    ),
    "8 bits into 32": (
        {},
        lambda: _other(EIGHT),
        ["state_bits is 32", "checkpoint's optimizer is 8"],
    ),
    "torch's into 8": (
        EIGHT,
        lambda: torch.optim.AdamW(compact()).state_dict(),
        ["state_bits is 8", "another optimizer"],
    ),
    "another optimizer": ({}, _foreign_state, ["'sum'", "exp_avg", "another optimizer"]),
    "fewer parameters": ({}, lambda: _other({}, MORE[:2]), ["[2]", "[4]"]),
    "amsgrad": (
        {},
        lambda: torch.optim.AdamW(compact(), amsgrad=True).state_dict(),
        ["amsgrad is True"],
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_and_changes_nothing(case):
    mode, make, words = REFUSED[case]
    optimizer = SelectedNeuronAdamW(compact(), **mode)
    drive(optimizer, 2)
    before = saved(optimizer)
    with pytest.raises(SpftError) as caught:
        optimizer.load_state_dict(make())
    message = str(caught.value)
    assert "\n" not in message
    assert all(word in message for word in words), message
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert same_bits(after["state"].values(), before["state"].values())
    drive(optimizer, 1, 2)

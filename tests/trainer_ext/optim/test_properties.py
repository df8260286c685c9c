"""For any shapes, groups, dtypes and hyperparameters, some steps agree with the reference twin: the
for-loop kernel bit for bit, the others within rounding of the sums."""

from __future__ import annotations

import torch
from adamw_reference import SelectedNeuronAdamWReference
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizers import compact, drive, same_bits

from trainer_ext import SelectedNeuronAdamW

STEPS = 4
SHAPES = st.lists(
    st.one_of(
        st.tuples(st.integers(1, 5), st.integers(1, 40)),
        st.tuples(st.integers(1, 70)),
        st.tuples(st.integers(60, 70), st.integers(60, 80)),
        st.just(()),
    ),
    min_size=1,
    max_size=5,
)
GROUP = st.fixed_dictionaries(
    {},
    optional={
        "lr": st.floats(1e-6, 1e-1),
        "betas": st.tuples(st.floats(0.0, 0.99), st.floats(0.0, 0.9999)),
        "eps": st.floats(1e-10, 1e-2),
        "weight_decay": st.floats(0.0, 1.0),
        "stochastic_rounding": st.booleans(),
        "seed": st.integers(-(2**40), 2**70),
    },
)


def groups(parameters, options) -> list[dict]:
    """The parameters dealt to as many groups as there are options."""
    return [{"params": parameters[i :: len(options)], **group} for i, group in enumerate(options)]


@given(
    SHAPES,
    st.lists(GROUP, min_size=1, max_size=3),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
    st.sampled_from([{"foreach": False}, {"foreach": True}, {"fused": True}, {}]),
)
@settings(max_examples=80, deadline=None)
def test_agrees_with_the_reference(shapes, options, dtype, kernel):
    ours, twins = compact(dtype, shapes), compact(dtype, shapes)
    drive(SelectedNeuronAdamW(groups(ours, options), **kernel), STEPS)
    drive(SelectedNeuronAdamWReference(groups(twins, options)), STEPS)
    if kernel == {"foreach": False}:
        assert same_bits(ours, twins)
    # A sum in another order may fall to the other side of a 16-bit rounding, in each of the steps:
    # each time by one unit in the last place of the value that the element has then.
    ulp = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(dtype)
    for start, a, b in zip(compact(dtype, shapes), ours, twins, strict=True):
        largest = torch.maximum(start.detach().abs(), a.detach().abs()).max().item()
        atol = 1e-6 if ulp is None else STEPS * ulp * largest
        torch.testing.assert_close(a, b, rtol=ulp or 1e-6, atol=atol)


@given(SHAPES, st.lists(GROUP, min_size=1, max_size=3))
@settings(max_examples=30, deadline=None)
def test_one_8bit_step_agrees_with_the_reference(shapes, options):
    ours, twins = compact(shapes=shapes), compact(shapes=shapes)
    drive(SelectedNeuronAdamW(groups(ours, options), state_bits=8), 1)
    drive(SelectedNeuronAdamWReference(groups(twins, options), state_bits=8), 1)
    for a, b in zip(ours, twins, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)

"""The delta path equals y + x (scatter(delta, index))ᵀ computed densely, forward and backward, and
keeps x, delta and index alone for the backward, x as the very tensor that came in. Tracking gives
the same gradients for a weight that holds the update already, and keeps x and index alone."""

from __future__ import annotations

import pytest
import torch

from trainer_ext.tuner.functional import (
    add_selected_outputs,
    overwrite_selected_outputs,
    track_selected_outputs,
)

D_IN, D_OUT, R = 12, 20, 5


def make(dtype=torch.float64, delta_dtype=None, leading=(2, 7)):
    torch.manual_seed(0)
    x = torch.randn(*leading, D_IN, dtype=dtype, requires_grad=True)
    weight = torch.randn(D_OUT, D_IN, dtype=dtype)
    delta = torch.randn(R, D_IN, dtype=delta_dtype or dtype, requires_grad=True)
    index = torch.tensor([0, 3, 4, 11, 19])
    return x, weight, delta, index


def dense(x, weight, delta, index):
    return x @ (weight + torch.zeros_like(weight).index_copy(0, index, delta.to(weight.dtype))).t()


def delta_path(x, weight, delta, index):
    return add_selected_outputs(torch.nn.functional.linear(x, weight), x, delta, index)


def tracked(x, weight, delta, index):
    held = weight.index_add(0, index, delta.detach().to(weight.dtype))
    return track_selected_outputs(torch.nn.functional.linear(x, held), x, delta, index)


@pytest.mark.parametrize("path", [delta_path, tracked])
@pytest.mark.parametrize("leading", [(7,), (2, 7), (2, 3, 4)])
def test_forward_and_backward_equal_the_dense_layer(leading, path):
    x, weight, delta, index = make(leading=leading)
    expected, got = dense(x, weight, delta, index), path(x, weight, delta, index)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(got, (x, delta), upstream),
        torch.autograd.grad(expected, (x, delta), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_gradcheck():
    x, weight, delta, index = make(leading=(3,))
    assert torch.autograd.gradcheck(lambda x, d: delta_path(x, weight, d, index), (x, delta))


@pytest.mark.parametrize("path", [delta_path, tracked])
@pytest.mark.parametrize("frozen", ["x", "delta"])
def test_only_what_is_asked_for_gets_a_gradient(frozen, path):
    x, weight, delta, index = make()
    (x if frozen == "x" else delta).requires_grad_(False)
    path(x, weight, delta, index).sum().backward()
    assert (x.grad is None) == (frozen == "x")
    assert (delta.grad is None) == (frozen == "delta")


def test_bf16_layer_with_fp32_delta():
    x, weight, delta, index = make(torch.bfloat16, torch.float32)
    got = delta_path(x, weight, delta, index)
    assert got.dtype == torch.bfloat16
    got.float().sum().backward()
    assert (x.grad.dtype, delta.grad.dtype) == (torch.bfloat16, torch.float32)
    expected = dense(x.double(), weight.double(), delta.double(), index)
    # three roundings to bf16 (2^-9 relative each): base output, extra output, their sum
    scale = (x.double().abs() @ (weight.double().abs().t())).max()
    assert (got.double() - expected).abs().max() <= 3 * 2**-9 * scale * 2


def test_saves_the_input_itself_and_nothing_of_the_output_size():
    x, weight, delta, index = make(leading=(50,))
    y = torch.nn.functional.linear(x, weight)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = add_selected_outputs(y, x, delta, index)
    assert out.data_ptr() == y.data_ptr()
    assert sorted(t.data_ptr() for t in saved) == sorted(t.data_ptr() for t in (x, delta, index))


def test_tracking_keeps_the_input_itself_and_gives_back_the_output_itself():
    x, weight, delta, index = make(leading=(50,))
    y = torch.nn.functional.linear(x, weight)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        out = track_selected_outputs(y, x, delta, index)
    assert out.data_ptr() == y.data_ptr()
    assert not out._is_view()  # else models could not go on in place
    out.mul_(2).sum().backward()
    assert sorted(t.data_ptr() for t in saved) == sorted(t.data_ptr() for t in (x, index))
    expected = 2 * x.detach().sum(0).expand_as(delta)
    torch.testing.assert_close(delta.grad, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("add", [add_selected_outputs, track_selected_outputs])
def test_views_are_written_without_copies_of_their_gradients(add):
    """Layers with a bias and Conv1D give views; writing to a view makes autograd copy gradients."""
    x, weight, delta, index = make()
    y = torch.nn.functional.linear(x, weight).view(2, 7, D_OUT)
    assert y._is_view()
    out = add(y, x, delta, index)
    assert out.data_ptr() == y.data_ptr()
    names, nodes = set(), [out.grad_fn]
    while nodes:
        node = nodes.pop()
        names.add(type(node).__name__)
        nodes += [n for n, _ in node.next_functions if n is not None]
    assert not any("CopySlices" in name for name in names), names


@pytest.mark.parametrize("with_bias", [True, False])
def test_overwritten_outputs_are_another_weights(with_bias):
    x, weight, rows, index = make()
    bias = torch.randn(D_OUT, dtype=x.dtype) if with_bias else None
    got = overwrite_selected_outputs(
        torch.nn.functional.linear(x, weight, bias), x, rows, index, bias
    )
    expected = torch.nn.functional.linear(x, weight.index_copy(0, index, rows), bias)
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    upstream = torch.randn_like(expected)
    ours, theirs = (torch.autograd.grad(out, x, upstream)[0] for out in (got, expected))
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_two_layers_keep_one_copy_of_a_shared_input_under_autocast():
    x, _, delta, index = make(torch.float32)
    saved = []
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
            for _ in range(2):
                y = torch.zeros(2, 7, D_OUT, dtype=torch.bfloat16)
                add_selected_outputs(y, x, delta, index)
    assert {t.data_ptr() for t in saved if t.shape == x.shape} == {x.data_ptr()}


@pytest.mark.parametrize("path", [delta_path, tracked])
def test_compiled_equals_eager(path):
    x, weight, delta, index = make(torch.float32)
    compiled = torch.compile(path, backend="aot_eager", fullgraph=True)
    expected, got = path(x, weight, delta, index), compiled(x, weight, delta, index)
    torch.testing.assert_close(got, expected)
    upstream = torch.randn_like(expected)
    for a, b in zip(
        torch.autograd.grad(got, (x, delta), upstream),
        torch.autograd.grad(expected, (x, delta), upstream),
        strict=True,
    ):
        torch.testing.assert_close(a, b)

"""group_taylor equals |sum_j w_ij gbar_ij| from full autograd gradients: error at most 1e-5 of the
layer's largest score in fp32, for several batches, with and without bias, padding and packing,
with gradient checkpointing on and off. No tensor of a weight's size is made for it. Outputs that
another kernel overwrites do not spoil it."""

from __future__ import annotations

import pytest
import torch
from adapters import wrapped
from calibrations import BATCHES, assert_close_to_oracle, measured, runs
from oracles import group_taylor
from tiny_models import CONFIGS, batch, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from trainer_ext import measure_importance
from trainer_ext.tuner.model import spft_layers


@pytest.mark.parametrize("checkpointing", [None, True, False], ids=["off", "reentrant", "not"])
@pytest.mark.parametrize("kind", sorted(BATCHES))
@pytest.mark.parametrize("architecture", sorted(CONFIGS))
def test_equals_the_formula(architecture, kind, checkpointing):
    model = wrapped(architecture, importance="group_taylor")
    if checkpointing is not None:
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
    scores = measured(model, BATCHES[kind])
    expected = group_taylor(tiny_model(architecture).eval(), BATCHES[kind])  # eval: no dropout
    assert_close_to_oracle(scores, expected)


def test_signs_cancel_before_the_absolute_value():
    """Absolute values only after all batches are summed: batches of opposite sign cancel."""
    model = wrapped(importance="group_taylor")

    def opposite(backward):
        loss = -model(**BATCHES["plain"][0]).loss
        if backward:
            loss.backward()
        return loss.detach()

    both = [*runs(model, BATCHES["plain"][:1]), opposite]
    for name, scores in measure_importance(model, both).scores.items():
        one = measured(model, BATCHES["plain"][:1])[name]
        assert scores.max() <= 1e-6 * one.max()


class _Overwriting(torch.autograd.Function):
    """Writes its gradient into its own input past the version counter, as Liger's swiglu does."""

    @staticmethod
    def forward(ctx, x):
        ctx.x = x
        return x * 2

    @staticmethod
    def backward(ctx, grad):
        ctx.x.data.copy_(2 * grad)
        return 2 * grad


def test_outputs_overwritten_by_a_fused_kernel_are_noticed_and_mended():
    def doubling_mlp(model):
        for layer in model.get_base_model().model.layers:
            forward = layer.mlp.act_fn.forward
            layer.mlp.act_fn.forward = lambda x, f=forward: f(_Overwriting.apply(x))
        return model

    def doubled(model):
        for layer in model.model.layers:
            forward = layer.mlp.act_fn.forward
            layer.mlp.act_fn.forward = lambda x, f=forward: f(x * 2)
        return model

    scores = measured(doubling_mlp(wrapped(importance="group_taylor")), BATCHES["plain"])
    expected = group_taylor(doubled(tiny_model().train()), BATCHES["plain"])
    assert_close_to_oracle(scores, expected)


def test_rotation_in_place_is_noticed_although_it_leaves_the_first_position():
    """Liger's rope rotates in the projections' own memory; position 0 keeps its values."""

    class RotateInPlace(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            factors = torch.linspace(1.0, 2.0, x.shape[1])[None, :, None]
            ctx.factors = factors
            x.data.mul_(factors)
            return x.view_as(x)

        @staticmethod
        def backward(ctx, grad):
            return grad * ctx.factors

    def rotated(model, rotate):
        for layer in model.model.layers:
            norm = layer.self_attn.q_proj
            norm.register_forward_hook(lambda module, inputs, output: rotate(output))
        return model

    model = wrapped(importance="group_taylor")
    rotated(model.get_base_model(), RotateInPlace.apply)
    scores = measured(model, BATCHES["plain"])
    factors = torch.linspace(1.0, 2.0, 16)[None, :, None]
    expected = group_taylor(rotated(tiny_model(), lambda y: y * factors), BATCHES["plain"])
    assert_close_to_oracle(scores, expected)


def test_models_that_add_to_an_output_in_place_are_scored():
    """Falcon adds the attention's output to the MLP's in place; the backward must still run."""
    model = wrapped(importance="group_taylor")
    for layer in model.get_base_model().model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda module, inputs, y: y.add_(0.1))
    base = tiny_model()
    for layer in base.model.layers:
        layer.mlp.down_proj.register_forward_hook(lambda module, inputs, y: y + 0.1)
    scores = measured(model, BATCHES["plain"])
    assert_close_to_oracle(scores, group_taylor(base, BATCHES["plain"]))


class _LargestTensor(TorchDispatchMode):
    def __init__(self, shapes):
        super().__init__()
        self.shapes, self.seen = shapes, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        # what shares the memory of an argument (transposed or detached weights) is no new memory
        old = {a.untyped_storage()._cdata for a in args if isinstance(a, torch.Tensor)}
        is_new = isinstance(out, torch.Tensor) and out.untyped_storage()._cdata not in old
        if is_new and tuple(out.shape) in self.shapes:
            self.seen.append((str(function), tuple(out.shape)))
        return out


def test_no_weight_gradient_is_ever_formed():
    model = wrapped("llama_bias", importance="group_taylor")
    # 33 tokens a row: no activation has the shape of a weight
    inputs = batch(rows=1, length=33)
    shapes = {(32, 32), (16, 32), (48, 32), (32, 48), (32, 16)}
    with _LargestTensor(shapes) as tracker:
        measured(model, [inputs])
    assert tracker.seen == []
    with _LargestTensor(shapes) as tracker:  # the tracker does see weight gradients
        group_taylor(tiny_model("llama_bias"), [inputs])
    assert tracker.seen


def test_layers_without_a_gradient_are_named():
    model = wrapped(importance="group_taylor")
    block = model.get_base_model().model.layers[1].mlp
    block.forward = lambda x: x
    found = measure_importance(model, runs(model, BATCHES["plain"]))
    assert found.silent_layers == [f"model.layers.1.mlp.{p}_proj" for p in ("gate", "up", "down")]
    assert all(found.scores[name].count_nonzero() == 0 for name in found.silent_layers)


def test_reference_forwards_without_gradient_do_not_count():
    def with_reference(model):
        for run_batch in runs(model, BATCHES["plain"]):

            def both(backward, run_batch=run_batch):
                with torch.no_grad(), model.disable_adapter():
                    model(**batch(9))
                loss = run_batch(backward)
                with torch.no_grad(), model.disable_adapter():
                    model(**batch(8))
                return loss

            yield both

    model = wrapped(importance="group_taylor")
    plain = measured(model, BATCHES["plain"])
    got = measure_importance(model, with_reference(model)).scores
    assert all(torch.equal(got[name], plain[name]) for name in plain)


def test_taps_are_gone_afterwards_even_after_an_error():
    model = wrapped(importance="group_taylor")

    def failing(backward):
        raise RuntimeError("out of data")

    with pytest.raises(RuntimeError, match="out of data"):
        measure_importance(model, [failing])
    for layer in spft_layers(model).values():
        assert "forward" not in layer.get_base_layer().__dict__
        assert not layer.calibrating

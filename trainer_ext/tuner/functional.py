"""What a selected update adds to a linear layer's forward and backward, in either form.

The delta path computes y + scatter(x deltaᵀ, index). Where the base weight already holds the update
(write-through) the forward adds nothing and the backward only delta's gradient.

Shapes: B... any leading dimensions, O = d_out, I = d_in, R selected neurons.
"""

from __future__ import annotations

import torch
from torch.autograd.function import once_differentiable


def add_selected_outputs(
    y: torch.Tensor, x: torch.Tensor, delta: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """Add the selected neurons' extra outputs to a linear layer's output, in place.

    Args:
        y: output of the base layer (B..., O). Overwritten and returned.
        x: the layer's input (B..., I).
        delta: compact update (R, I); its gradient has its own dtype.
        index: int64 (R,), distinct rows of the base weight.

    The products are computed in y's dtype, as the base layer's own are. Only x, delta and index are
    kept for the backward: x as it came in, so that layers that share an input share one copy.
    """
    if torch.compiler.is_compiling():
        # The compiler plans memory itself and cannot look into an in-place autograd function.
        return y.index_add(-1, index, _outputs_of(x, delta, None, y.dtype))
    return _AddSelectedOutputs.apply(_no_view(y), x, delta, index)


def track_selected_outputs(
    y: torch.Tensor, x: torch.Tensor, delta: torch.Tensor, index: torch.Tensor
) -> torch.Tensor:
    """Let delta get its gradient from a linear layer's output that contains its share already.

    grad_delta = grad_y[:, index]ᵀ x; the gradients of y's own graph are as they were.

    Args:
        y: output (B..., O) of a layer whose weight holds the update. Returned.
        x, delta, index: as in `add_selected_outputs`; x is all that is kept for the backward, and
            index.
    """
    if torch.compiler.is_compiling():
        return _TrackSelectedOutputsCompiled.apply(y, x, delta, index)
    return _TrackSelectedOutputs.apply(_no_view(y), x, delta, index)


def replace_selected_outputs(
    y: torch.Tensor,
    x: torch.Tensor,
    delta: torch.Tensor,
    anchor: torch.Tensor,
    index: torch.Tensor,
    bias: torch.Tensor | None,
    selected: torch.Tensor,
) -> torch.Tensor:
    """Replace the selected neurons' outputs, in place, by x (anchor + delta)ᵀ + bias[index].

    Args:
        y: output of the base layer (B..., O). Overwritten and returned; its gradient is zero where
            it was replaced.
        x, delta, index: as in `add_selected_outputs`.
        anchor: (R, I), without gradient.
        bias: (O,) of the layer, or None.
        selected: bool (), looked at by compiled graphs, which may be older than the selection.

    anchor + delta is summed in the widest dtype of the three and rounded to y's: a 16-bit anchor
    does not cut off what a 16-bit delta holds below its precision.
    """
    bias = None if bias is None else bias.detach().index_select(0, index)
    if torch.compiler.is_compiling():
        outputs = _outputs_of(x, _sum(anchor, delta, y.dtype), bias, y.dtype)
        outputs = torch.where(selected, outputs, y.index_select(-1, index))
        return y.index_copy(-1, index, outputs)
    return _ReplaceSelectedOutputs.apply(_no_view(y), x, delta, anchor, index, bias)


def overwrite_selected_outputs(
    y: torch.Tensor,
    x: torch.Tensor,
    rows: torch.Tensor,
    index: torch.Tensor,
    bias: torch.Tensor | None,
    selected: torch.Tensor | None = None,
) -> torch.Tensor:
    """Replace some neurons' outputs, in place, by those of other weights: x rowsᵀ + bias[index].

    Args:
        y: output of the layer (B..., O). Overwritten and returned.
        rows: (R, I) weights of the neurons `index`.
        bias: (O,) of the layer, or None.
        selected: bool (), whether to do so; None: do.
    """
    bias = None if bias is None else bias.index_select(0, index)
    outputs = _outputs_of(x, rows, bias, y.dtype)
    if selected is not None:
        outputs = torch.where(selected, outputs, y.index_select(-1, index))
    return y.index_copy_(-1, index, outputs)


def _outputs_of(x, rows, bias, dtype: torch.dtype) -> torch.Tensor:
    """Outputs (B..., R) of a linear layer with the weights `rows`, computed in `dtype`."""
    bias = None if bias is None else bias.to(dtype)
    # autocast may compute in another dtype than the base layer's output has
    return torch.nn.functional.linear(x.to(dtype), rows.to(dtype), bias).to(dtype)


def _sum(anchor, delta, dtype: torch.dtype) -> torch.Tensor:
    """anchor + delta in the widest dtype of theirs and `dtype`."""
    return anchor.to(torch.promote_types(anchor.dtype, dtype)) + delta


def _no_view(y: torch.Tensor) -> torch.Tensor:
    """The same memory, but nobody's view to autograd.

    Layers with a bias and Conv1D give views; writing to one in place makes the backward copy the
    whole gradient, twice.
    """
    return torch.ops.aten._unsafe_view(y, y.shape) if y._is_view() else y


class _AddSelectedOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_BO, x_BI, delta_RI, index_R):
        y_BO.index_add_(-1, index_R, _outputs_of(x_BI, delta_RI, None, y_BO.dtype))
        ctx.mark_dirty(y_BO)
        ctx.save_for_backward(x_BI, delta_RI, index_R)
        return y_BO

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BO):
        x_BI, delta_RI, index_R = ctx.saved_tensors
        grad_x = grad_delta = None
        grad_RT = _selected_gradients(grad_BO, index_R)
        if ctx.needs_input_grad[1]:
            grad_TI = grad_RT.t() @ delta_RI.to(grad_RT.dtype)
            grad_x = grad_TI.view(x_BI.shape).to(x_BI.dtype)
        if ctx.needs_input_grad[2]:
            grad_delta = _grad_delta(grad_RT, x_BI, delta_RI.dtype)
        return grad_BO, grad_x, grad_delta, None


def _selected_gradients(grad_BO, index_R) -> torch.Tensor:
    """The selected outputs' gradients (R, T), gathered in the order that is fastest on the device.

    benchmarks/gpu_kernels.py times both orders.
    """
    grad_TO = grad_BO.reshape(-1, grad_BO.shape[-1])
    if grad_TO.is_cuda:
        return grad_TO.index_select(1, index_R).t()
    return grad_TO.t().index_select(0, index_R)


def _grad_delta(grad_RT, x_BI, dtype) -> torch.Tensor:
    x_TI = x_BI.reshape(-1, x_BI.shape[-1]).to(grad_RT.dtype)
    wider = dtype == torch.float32 and grad_RT.dtype in (torch.bfloat16, torch.float16)
    if wider and grad_RT.is_cuda and not torch.compiler.is_compiling():
        # the sums are fp32 inside the kernel anyway: not rounded, and no kernel to widen them
        return torch.mm(grad_RT, x_TI, out_dtype=dtype)
    return (grad_RT @ x_TI).to(dtype)


class _ReplaceSelectedOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_BO, x_BI, delta_RI, anchor_RI, index_R, bias_R):
        rows_RI = _sum(anchor_RI, delta_RI, y_BO.dtype)
        y_BO.index_copy_(-1, index_R, _outputs_of(x_BI, rows_RI, bias_R, y_BO.dtype))
        ctx.mark_dirty(y_BO)
        ctx.save_for_backward(x_BI, delta_RI, anchor_RI, index_R)
        return y_BO

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BO):
        x_BI, delta_RI, anchor_RI, index_R = ctx.saved_tensors
        grad_y = grad_x = grad_delta = None
        grad_RT = _selected_gradients(grad_BO, index_R)
        if ctx.needs_input_grad[0]:
            grad_y = grad_BO.index_fill(-1, index_R, 0)
        if ctx.needs_input_grad[1]:
            rows_RI = _sum(anchor_RI, delta_RI, grad_RT.dtype)
            grad_TI = grad_RT.t() @ rows_RI.to(grad_RT.dtype)
            grad_x = grad_TI.view(x_BI.shape).to(x_BI.dtype)
        if ctx.needs_input_grad[2]:
            grad_delta = _grad_delta(grad_RT, x_BI, delta_RI.dtype)
        return grad_y, grad_x, grad_delta, None, None, None


class _TrackSelectedOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_BO, x_BI, delta_RI, index_R):
        # As an in-place function, because an output that is the input as it stands would be a view,
        # which models that go on in place could not write to.
        ctx.mark_dirty(y_BO)
        ctx.save_for_backward(x_BI, index_R)
        ctx.dtype = delta_RI.dtype
        return y_BO

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BO):
        x_BI, index_R = ctx.saved_tensors
        grad_RT = _selected_gradients(grad_BO, index_R)
        return grad_BO, None, _grad_delta(grad_RT, x_BI, ctx.dtype), None


class _TrackSelectedOutputsCompiled(torch.autograd.Function):
    """The same without in-place marks, which the compiler cannot look into; it drops the copy."""

    @staticmethod
    def forward(ctx, y_BO, x_BI, delta_RI, index_R):
        ctx.save_for_backward(x_BI, index_R)
        ctx.dtype = delta_RI.dtype
        return y_BO.clone()

    @staticmethod
    def backward(ctx, grad_BO):
        x_BI, index_R = ctx.saved_tensors
        grad_RT = _selected_gradients(grad_BO, index_R)
        return grad_BO, None, _grad_delta(grad_RT, x_BI, ctx.dtype), None

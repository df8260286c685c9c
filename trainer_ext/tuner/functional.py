"""The delta path: y + scatter(x deltaᵀ, index), with its own backward.

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
        extra = torch.nn.functional.linear(x.to(y.dtype), delta.to(y.dtype))
        return y.index_add(-1, index, extra)
    return _AddSelectedOutputs.apply(y, x, delta, index)


class _AddSelectedOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_BO, x_BI, delta_RI, index_R):
        extra_BR = x_BI.to(y_BO.dtype) @ delta_RI.to(y_BO.dtype).t()
        y_BO.index_add_(-1, index_R, extra_BR)
        ctx.mark_dirty(y_BO)
        ctx.save_for_backward(x_BI, delta_RI, index_R)
        return y_BO

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_BO):
        x_BI, delta_RI, index_R = ctx.saved_tensors
        grad_x = grad_delta = None
        grad_BR = grad_BO.index_select(-1, index_R)
        if ctx.needs_input_grad[1]:
            grad_x = (grad_BR @ delta_RI.to(grad_BR.dtype)).to(x_BI.dtype)
        if ctx.needs_input_grad[2]:
            grad_TR = grad_BR.reshape(-1, grad_BR.shape[-1])
            x_TI = x_BI.reshape(-1, x_BI.shape[-1]).to(grad_BR.dtype)
            grad_delta = (grad_TR.t() @ x_TI).to(delta_RI.dtype)
        return grad_BO, grad_x, grad_delta, None

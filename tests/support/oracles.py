"""Independent references: plain autograd on dense weights, formulas written out."""

from __future__ import annotations

import torch
from transformers.pytorch_utils import Conv1D


def mean_gradients(model, batches: list[dict]) -> dict[str, torch.Tensor]:
    """Mean over batches of the loss gradient of every linear weight, as (d_out, d_in)."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))}
    model.requires_grad_(True)
    model.zero_grad()
    for batch in batches:
        (model(**batch).loss / len(batches)).backward()
    gradients = {
        name: rows_of(layer, layer.weight.grad.clone())
        for name, layer in layers.items()
        if layer.weight.grad is not None
    }
    model.zero_grad()
    return gradients


def weights(model) -> dict[str, torch.Tensor]:
    """Every linear weight as (d_out, d_in)."""
    return {
        name: rows_of(layer, layer.weight.detach().clone())
        for name, layer in model.named_modules()
        if isinstance(layer, (torch.nn.Linear, Conv1D))
    }


def rows_of(layer, tensor: torch.Tensor) -> torch.Tensor:
    """A weight-shaped tensor with one output neuron a row; Conv1D stores them as columns."""
    return tensor.t() if isinstance(layer, Conv1D) else tensor


def group_taylor(model, batches: list[dict]) -> dict[str, torch.Tensor]:
    """|sum_j w_ij gbar_ij| from full weight gradients, in fp64."""
    gradients, dense = mean_gradients(model, batches), weights(model)
    return {
        name: (dense[name].double() * gradient.double()).sum(dim=1).abs()
        for name, gradient in gradients.items()
    }

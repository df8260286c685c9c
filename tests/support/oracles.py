"""Independent references: plain autograd on dense weights, formulas written out."""

from __future__ import annotations

import torch
from transformers.pytorch_utils import Conv1D


def models_own_loss(model, batch: dict) -> torch.Tensor:
    return model(**batch).loss


def mean_gradients(model, batches: list, loss=models_own_loss) -> dict[str, torch.Tensor]:
    """Mean over batches of the loss gradient of every linear weight, as (d_out, d_in)."""
    layers = {n: m for n, m in model.named_modules() if isinstance(m, (torch.nn.Linear, Conv1D))}
    model.requires_grad_(True)
    model.zero_grad()
    for batch in batches:
        (loss(model, batch) / len(batches)).backward()
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


def group_taylor(model, batches: list, loss=models_own_loss) -> dict[str, torch.Tensor]:
    """|sum_j w_ij gbar_ij| from full weight gradients, in fp64."""
    gradients, dense = mean_gradients(model, batches, loss), weights(model)
    return {
        name: (dense[name].double() * gradient.double()).sum(dim=1).abs()
        for name, gradient in gradients.items()
    }


def taylor(model, batches: list, loss=models_own_loss) -> dict[str, torch.Tensor]:
    """sum_j |w_ij gbar_ij| from full weight gradients, in fp64."""
    gradients, dense = mean_gradients(model, batches, loss), weights(model)
    return {
        name: (dense[name].double() * gradient.double()).abs().sum(dim=1)
        for name, gradient in gradients.items()
    }


def wanda(model, batches: list[dict]) -> dict[str, torch.Tensor]:
    """sum_j |w_ij| * ||x_j||_2 over all tokens that the attention mask does not call padding."""
    dense = weights(model)
    squares = dict.fromkeys(dense, 0.0)
    hooks = []
    for name, layer in model.named_modules():
        if name in dense:

            def note(module, inputs, name=name):
                tokens = inputs[0].detach().double().flatten(0, -2)
                squares[name] = squares[name] + (tokens * real[:, None]).square().sum(dim=0)

            hooks.append(layer.register_forward_pre_hook(note))
    with torch.no_grad():
        for batch in batches:
            mask = batch.get("attention_mask", torch.ones_like(batch["input_ids"]))
            real = mask.flatten().double()
            model(**batch)
    for hook in hooks:
        hook.remove()
    return {n: (w.double().abs() * squares[n].sqrt()).sum(dim=1) for n, w in dense.items()}


def quantile_mean(model, batches: list[dict], classes: list[list[int]]) -> dict[str, torch.Tensor]:
    """Mean over quantiles 0, 0.1 ... 1 of the classes' |sum_j w_ij gbar^c_ij|.

    gbar^c is the mean over the batches of the gradient of the mean loss of class c in that batch,
    weighted by the class's share of the batch's targets; each class is run by itself.
    """
    dense = weights(model)
    by_class: dict[str, list[torch.Tensor]] = {name: [] for name in dense}
    for number in sorted({c for rows in classes for c in rows}):
        sums = dict.fromkeys(dense, 0.0)
        weight = 0.0
        for batch, row_classes in zip(batches, classes, strict=True):
            rows = [row for row, c in enumerate(row_classes) if c == number]
            if not rows:
                continue
            part = {key: value[rows] for key, value in batch.items()}
            share = _targets(part) / _targets(batch)
            for name, gradient in mean_gradients(model, [part]).items():
                sums[name] = sums[name] + gradient.double() * share
            weight += share
        for name, total in sums.items():
            if isinstance(total, torch.Tensor):
                by_class[name].append((dense[name].double() * total / weight).sum(dim=1).abs())
    return {
        name: torch.stack(
            [torch.quantile(torch.stack(scores), q / 10, dim=0) for q in range(11)]
        ).mean(dim=0)
        for name, scores in by_class.items()
        if scores
    }


def _targets(batch: dict) -> int:
    return int((batch["labels"][:, 1:] != -100).sum())

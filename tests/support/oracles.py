"""Independent references: plain autograd on dense weights, formulas written out."""

from __future__ import annotations

import torch
from tiny_models import tiny_model
from transformers.pytorch_utils import Conv1D

from trainer_ext.importance.noise import chunk_rows, weight_noise


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


# What SpftConfig is to have, for `zo_taylor` below to be its oracle: seed, zo_eps, zo_directions.
ZO_SEED, ZO_EPS, ZO_DIRECTIONS = 42, 1e-3, 3


def explicit_noise(
    number: int, direction: int, name: str, stored: torch.Tensor, device="cpu"
) -> torch.Tensor:
    """The noise of a whole weight in one direction of one batch, as made on `device`."""
    rows, columns = stored.shape
    chunks = range(-(-rows // chunk_rows(columns)))
    key = (ZO_SEED, number, direction, name)
    noise = [weight_noise(key, chunk, rows, columns, device) for chunk in chunks]
    return torch.cat(noise).to(stored)


def zo_taylor(model, names, batches: list, device="cpu") -> dict[str, torch.Tensor]:
    """sum_j |w_ij gbar_ij|, gbar the mean of c z, by moving all weights along explicit noise.

    Args:
        model: a plain one in fp64 and eval mode, which is changed.
        names: of the layers.
        device: where the noise is made: it is another one on a GPU.
    """
    stored = {name: model.get_submodule(name).weight for name in names}
    original = {name: weight.detach().clone() for name, weight in stored.items()}
    gradients = {name: torch.zeros_like(weight) for name, weight in stored.items()}
    with torch.no_grad():
        for number, inputs in enumerate(batches):
            for direction in range(ZO_DIRECTIONS):
                noise = {
                    name: explicit_noise(number, direction, name, weight, device)
                    for name, weight in stored.items()
                }
                losses = []
                for sign in (1, -1):
                    for name, weight in stored.items():
                        weight.copy_(original[name] + sign * ZO_EPS * noise[name])
                    losses.append(model(**inputs).loss.double())
                c = (losses[0] - losses[1]) / (2 * ZO_EPS)
                for name, z in noise.items():
                    gradients[name] += c * z / (len(batches) * ZO_DIRECTIONS)
    return {
        name: rows_of(model.get_submodule(name), (weight * gradients[name]).abs()).sum(dim=1)
        for name, weight in original.items()
    }


def rounding_of_zo_taylor(architecture: str, names) -> dict[str, torch.Tensor]:
    """Largest error of each score of `zo_taylor` that the rounding of an fp32 loss explains.

    A loss computed in fp32 is off by some units in its last place, u each. One direction's c is
    then off by up to 2 k u / (2 eps), and a score by that times the mean of sum_j |w_ij z_ij|. Mean
    over n independent directions: k = 32 units leaves room for the forward's own rounding.
    """
    unit = torch.finfo(torch.float32).eps * 8  # losses lie between 8 and 16
    dense = weights(tiny_model(architecture))
    return {name: 32 * unit / ZO_EPS * dense[name].double().abs().sum(dim=1) for name in names}

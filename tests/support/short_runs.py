"""Short runs of AdamW on a tiny model: of an adapter, and of the dense weights that it stands for.

AdamW turns rounding noise in near-zero gradients into full-size updates. An epsilon of 1e-3 is well
above that noise (1e-8; the gradients here are 1e-2 to 1).
"""

from __future__ import annotations

import torch
from adapters import selected
from oracles import rows_of
from tiny_models import batch, tiny_model
from written import is_base, without_dropout

from trainer_ext import restore_base
from trainer_ext.tuner.model import deltas, spft_layers

ADAMW = {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.0}


def checkpointed(model, use_reentrant: bool | None) -> None:
    """Let a model checkpoint its activations, of either kind; None: leave it."""
    if use_reentrant is not None:
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})


def take_steps(model, steps: int) -> list[float]:
    """Train what requires a gradient; returns the losses."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], **ADAMW)
    losses = []
    for step in range(steps):
        loss = model(**batch(step % 7, device=model.device)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def run_compact(architecture, forward, steps: int, device="cpu", checkpointing=None):
    """Train an adapter; returns the losses and the deltas, and leaves W0 behind."""
    model = without_dropout(selected(architecture, device=device, forward=forward).train())
    checkpointed(model, checkpointing)
    losses = take_steps(model, steps)
    written = {layer.written is not None for layer in spft_layers(model).values()}
    assert written == {forward != "delta"}
    restore_base(model)
    assert is_base(model, architecture)
    return losses, {n: d.weight.detach() for n, d in deltas(model).items()}


def run_dense(architecture, steps: int, device="cpu"):
    """All weights trained, the gradients of all but the selected rows set to zero; returns the
    losses and how far the selected rows have moved."""
    index = {n: d.index for n, d in deltas(selected(architecture, device=device)).items()}
    model = without_dropout(dense(architecture, index, device).train())
    start = trained_rows(model, index)
    losses = take_steps(model, steps)
    return losses, {n: rows - start[n] for n, rows in trained_rows(model, index).items()}


def dense(architecture, index: dict, device="cpu", dtype=torch.float32):
    """A plain model that trains the weights of the named layers, but for all rows not in `index`,
    whose gradients are zero."""
    model = tiny_model(architecture, dtype=dtype).to(device).requires_grad_(False)
    for name, chosen in index.items():
        weight = model.get_submodule(name).weight.requires_grad_(True)
        mask = torch.zeros_like(weight, requires_grad=False)
        rows_of(model.get_submodule(name), mask).index_fill_(0, chosen, 1)
        weight.register_hook(lambda gradient, mask=mask: gradient * mask)
    return model


def trained_rows(model, index: dict, gradients: bool = False) -> dict[str, torch.Tensor]:
    """Copies of the rows `index` of a plain model's weights, or of the weights' gradients."""
    found = {}
    for name, chosen in index.items():
        layer = model.get_submodule(name)
        tensor = layer.weight.grad if gradients else layer.weight.detach()
        found[name] = rows_of(layer, tensor)[chosen].clone()
    return found

"""The state that a model is in while it is calibrated, and in which it is left."""

from __future__ import annotations

import random
import re
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

# Attributes that make a forward in train mode random: every kind of dropout, NEFTune's noise,
# the jitter of routers.
_RANDOM_FORWARD = re.compile(r"drop|neftune_noise_alpha|jitter_noise")


@contextmanager
def calibration_mode(model: nn.Module, layers: dict, gradients: bool = True):
    """Train mode without randomness and without trainable parameters, undone on exit.

    Train mode because activation checkpointing is off in eval mode. Without `gradients` nothing
    requires a gradient, so forwards keep no activations; checkpointing, whose reentrant form runs
    without grad mode as a reference model does, is off then. What the loss itself flips
    (DPO's reference forward switches requires_grad back on) is restored too.
    """
    modules = list(model.modules())
    training = [module.training for module in modules]
    requires_grad = [(p, p.requires_grad) for p in model.parameters()]
    silenced: list[tuple[object, str, float | bool]] = []
    hooks: list = []
    try:
        _silence(modules, silenced)
        hooks += _set_input_grads(model, gradients)
        if not gradients:
            _stop_checkpointing(modules, silenced)
        model.train()
        for module in modules:
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()  # its running statistics are part of the model
        for parameter, _ in requires_grad:
            parameter.requires_grad_(False)
        for layer in layers.values():
            layer.calibrating = True
        # callers may have gradients off, which says "do not count" to the metrics
        with random_state_kept(), torch.enable_grad():
            yield
    finally:
        for layer in layers.values():
            layer.calibrating = False
        for hook in hooks:
            hook.remove()
        for owner, name, value in silenced:
            setattr(owner, name, value)
        for parameter, flag in requires_grad:
            parameter.requires_grad_(flag)
        for module, mode in zip(modules, training, strict=True):
            module.training = mode


def _silence(modules: list[nn.Module], silenced: list[tuple[object, str, float]]) -> None:
    """Set everything that makes a forward random to zero; notes what to set back in `silenced`."""
    configs = {id(c): c for m in modules if hasattr(c := getattr(m, "config", None), "__dict__")}
    for owner in [*modules, *configs.values()]:
        names = [n for n in vars(owner) if _RANDOM_FORWARD.search(n)]
        if isinstance(owner, nn.modules.dropout._DropoutNd):
            names.append("p")
        for name in names:
            value = getattr(owner, name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value:
                silenced.append((owner, name, value))
                setattr(owner, name, 0.0)


def _stop_checkpointing(modules: list[nn.Module], stopped: list) -> None:
    for module in modules:
        if getattr(module, "gradient_checkpointing", False) is True:
            stopped.append((module, "gradient_checkpointing", True))
            module.gradient_checkpointing = False


def _set_input_grads(model: nn.Module, required: bool) -> list:
    """Let the embeddings' output require a gradient or not; returns the hooks that do it.

    Reentrant checkpointing drops the graph of blocks whose input requires none. Models prepared for
    checkpointing have hooks that require one, in the towers of a multimodal model too, so that
    forwards would keep all activations.
    """
    models = [model] if required else [model, *model.modules()]
    embeddings = [_input_embeddings(module) for module in models]

    def hook(module, inputs, output):
        if torch.is_grad_enabled() and output.is_floating_point() and output.is_leaf:
            output.requires_grad_(required)

    unique = {id(module): module for module in embeddings if module is not None}
    return [module.register_forward_hook(hook) for module in unique.values()]


def _input_embeddings(module: nn.Module) -> nn.Module | None:
    if not hasattr(module, "get_input_embeddings"):
        return None
    try:
        return module.get_input_embeddings()
    except NotImplementedError:  # transformers' models without any
        return None


@contextmanager
def random_state_kept():
    """Put the states of the global random generators back on exit."""
    python, numpy, cpu = random.getstate(), np.random.get_state(), torch.get_rng_state()
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_rng_state(cpu)
        if cuda is not None:
            torch.cuda.set_rng_state_all(cuda)

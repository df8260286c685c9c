"""SPFT models ready for a test: wrapped, neurons selected, delta filled."""

from __future__ import annotations

import torch
from peft import PeftModel, get_peft_model
from tiny_models import tiny_model

from trainer_ext import SpftConfig, select_neurons
from trainer_ext.tuner.model import deltas


def wrapped(architecture: str = "llama", dtype=torch.float32, device="cpu", **fields) -> PeftModel:
    """A fresh adapter on a tiny model; nothing is selected."""
    fields = {"r": 4, "importance": "random", "task_type": "CAUSAL_LM", **fields}
    return get_peft_model(tiny_model(architecture, dtype=dtype).to(device), SpftConfig(**fields))


def selected(architecture: str = "llama", dtype=torch.float32, **fields) -> PeftModel:
    """As `wrapped`, with neurons selected at random."""
    model = wrapped(architecture, dtype, **fields)
    select_neurons(model)
    return model


def fill_deltas(model: PeftModel, adapter_name: str = "default", scale: float = 0.05) -> None:
    """Random non-zero deltas, as after training."""
    generator = torch.Generator().manual_seed(1)
    for delta in deltas(model, adapter_name).values():
        values = scale * torch.randn(delta.weight.shape, generator=generator)
        delta.weight.data = values.to(delta.weight.device)


def trained(architecture: str = "llama", dtype=torch.float32, **fields) -> PeftModel:
    """As `selected`, with non-zero deltas."""
    model = selected(architecture, dtype, **fields)
    fill_deltas(model)
    return model

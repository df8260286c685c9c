"""A stack of linear layers with an adapter: a model of which nothing but SPFT's layers could wait
for a device, and that is compiled quickly."""

from __future__ import annotations

import torch
from adapters import fill_deltas
from peft import PeftModel, get_peft_model
from torch import nn

from trainer_ext import SpftConfig, select_neurons

WIDTH = 32


def stack(device="cpu", dtype=torch.float32, **fields) -> PeftModel:
    """Two layers and a nonlinearity, neurons selected at random, deltas filled."""
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(WIDTH, 48), nn.SiLU(), nn.Linear(48, WIDTH, bias=False))
    fields = {"r": 4, "importance": "random", "target_modules": ["0", "2"], **fields}
    model = get_peft_model(layers.to(device, dtype), SpftConfig(**fields))
    select_neurons(model)
    fill_deltas(model)
    return model


def batch_of(device="cpu", dtype=torch.float32, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 8, WIDTH, generator=generator).to(device, dtype)


def loss_of(model, data: torch.Tensor) -> torch.Tensor:
    return model(data).float().square().mean()

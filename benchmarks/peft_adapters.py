"""The other PEFT methods, and the rank at which each trains as many parameters as SPFT."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, MissConfig, PeftConfig, ShiraConfig, get_peft_model
from torch import nn

TOLERANCE = 0.1  # of the budget; a rank that suits a method better may be so far from it

Shape = tuple[int, int]  # (d_in, d_out)
Fits = Callable[[int, list[Shape]], bool]


@dataclass(frozen=True)
class Adapter:
    """A PEFT method whose size is one rank for all layers.

    Attributes:
        config: makes the configuration for a rank and the names of the layers.
        fits: which ranks are allowed for layers of these shapes, the best ones first; only the last
            counts where no rank that fits is within the tolerance of the budget.
        untrained: part of the names of those of its parameters that its optimizer leaves alone.
    """

    config: Callable[[int, list[str]], PeftConfig]
    fits: tuple[Fits, ...] = (lambda rank, shapes: True,)
    untrained: str | None = None


def _lora(rank: int, names: list[str], **options) -> LoraConfig:
    return LoraConfig(r=rank, target_modules=names, **options)


def _shira(rank: int, names: list[str]) -> ShiraConfig:
    config = ShiraConfig(r=rank, target_modules=names)
    config.mask_fn = _random_mask
    return config


def _random_mask(base_layer: nn.Linear, r: int, **options) -> torch.Tensor | None:
    # As PEFT's own, which draws on the CPU: that takes minutes for the layers of 8b.
    weight = base_layer.weight
    if weight.is_meta:
        return None  # a layer that is only counted
    mask = torch.zeros(weight.numel(), dtype=torch.bool, device=weight.device)
    mask[torch.randperm(weight.numel(), device=weight.device)[: r * sum(weight.shape)]] = True
    return mask.view_as(weight)


def _is_sparse(rank: int, shapes: list[Shape]) -> bool:
    # PEFT refuses more SHiRA parameters than a layer has weights.
    return all(rank * (d_in + d_out) <= d_in * d_out for d_in, d_out in shapes)


ADAPTERS = {
    "lora": Adapter(_lora),
    "dora": Adapter(lambda rank, names: _lora(rank, names, use_dora=True)),
    "lora_fa": Adapter(_lora, untrained="lora_A"),
    "miss": Adapter(
        lambda rank, names: MissConfig(r=rank, target_modules=names),
        # It pads its input unless the rank divides the input's width; PEFT wants an even rank.
        fits=(
            lambda rank, shapes: all(d_in % rank == 0 for d_in, _ in shapes),
            lambda rank, shapes: rank % 2 == 0,
        ),
    ),
    "shira": Adapter(_shira, fits=(_is_sparse,)),
}


def trained_parameters_at(adapter: Adapter, shapes: list[Shape], rank: int) -> int:
    """How many parameters a method trains in linear layers of these shapes, as PEFT builds it."""
    number = Counter(shapes)
    layers = nn.ModuleDict(
        {f"{d_in}x{d_out}": nn.Linear(d_in, d_out, False, "meta") for d_in, d_out in number}
    )
    get_peft_model(layers, adapter.config(rank, list(layers)))
    return sum(
        number[shape] * parameter.numel()
        for shape, layer in zip(number, layers.values(), strict=True)
        for name, parameter in layer.named_parameters()
        if parameter.requires_grad and not (adapter.untrained and adapter.untrained in name)
    )


def nearest_rank(adapter: Adapter, shapes: list[Shape], budget: int) -> int:
    """The allowed rank at which a method trains the number of parameters nearest to the budget."""
    at_one, at_two = (trained_parameters_at(adapter, shapes, rank) for rank in (1, 2))
    per_rank = at_two - at_one

    def error(rank: int) -> float:
        return abs(at_one + (rank - 1) * per_rank - budget) / budget

    best = 1
    for fits in adapter.fits:
        ranks = range(1, 2 * math.ceil(budget / per_rank) + 2)
        best = min((rank for rank in ranks if fits(rank, shapes)), key=error, default=1)
        if error(best) <= TOLERANCE:
            break
    return best

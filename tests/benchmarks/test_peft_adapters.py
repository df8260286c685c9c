"""Invariants of benchmarks/peft_adapters.py:

- What is counted for a rank is what the method trains in a whole model at that rank.
- A method's rank is the nearest to the budget among those that it allows: SHiRA's leaves no layer
  with more parameters than weights; MiSS's divides the inputs' widths if that costs at most 10 % of
  the budget, and is even otherwise.
- SHiRA's mask has as many entries as PEFT's own.
"""

from __future__ import annotations

import peft_adapters
import pytest
import torch
import workload
from peft import get_peft_model
from tiny_benchmark import make_workload


def count(name: str, work, rank: int) -> int:
    return peft_adapters.trained_parameters_at(
        peft_adapters.ADAPTERS[name], list(work.layers.values()), rank
    )


@pytest.mark.parametrize("name", peft_adapters.ADAPTERS)
@pytest.mark.parametrize("rank", [1, 2, 6])
def test_the_count_is_what_a_whole_model_trains(name, rank):
    work = make_workload()
    adapter = peft_adapters.ADAPTERS[name]
    model = get_peft_model(work.base_model(), adapter.config(rank, list(work.layers)))
    trained = [
        p.numel() for n, p in model.named_parameters() if p.requires_grad and not _is_a(name, n)
    ]
    assert count(name, work, rank) == sum(trained)


def _is_a(name: str, parameter: str) -> bool:
    return name == "lora_fa" and "lora_A" in parameter


@pytest.mark.parametrize("size", ["50m", "135m", "1b", "8b"])
@pytest.mark.parametrize("name", peft_adapters.ADAPTERS)
def test_the_rank_is_the_nearest_to_spfts_budget(name, size):
    work = make_workload(size=workload.SIZES[size], r=workload.SIZES[size].r)
    shapes = list(work.layers.values())
    rank = peft_adapters.nearest_rank(peft_adapters.ADAPTERS[name], shapes, work.budget)
    error = abs(count(name, work, rank) - work.budget)
    assert error <= 0.05 * work.budget
    if name != "miss":
        others = (other for other in (rank - 1, rank + 1) if other)
        assert all(error <= abs(count(name, work, other) - work.budget) for other in others)
    else:
        whole = all(d_in % rank == 0 for d_in, _ in shapes)
        assert whole or rank % 2 == 0


@pytest.mark.parametrize(
    ("r", "expected"),
    [(30, 32), (24, 24), (25, 24)],  # 16 and 32 divide 64 and 128; 24 is too far from both
)
def test_miss_gets_a_rank_without_padding_where_one_is_near(r, expected):
    work = make_workload(r=r)
    shapes = list(work.layers.values())
    rank = peft_adapters.nearest_rank(peft_adapters.ADAPTERS["miss"], shapes, work.budget)
    assert rank == expected


def test_shira_stays_within_its_smallest_layer():
    shapes = [(64, 64), (64, 8)]
    rank = peft_adapters.nearest_rank(peft_adapters.ADAPTERS["shira"], shapes, 10**6)
    assert rank == 64 * 8 // (64 + 8)
    adapter = peft_adapters.ADAPTERS["shira"]
    get_peft_model(layers_of(shapes), adapter.config(rank, ["0", "1"]))
    layers = layers_of(shapes)
    with pytest.raises(ValueError, match="more shira params"):
        get_peft_model(layers, adapter.config(rank + 1, ["0", "1"]))


def layers_of(shapes) -> torch.nn.Module:
    layers = [torch.nn.Linear(*shape, bias=False) for shape in shapes]
    return torch.nn.ModuleDict({str(number): layer for number, layer in enumerate(layers)})


def test_shiras_mask_is_as_large_as_pefts():
    from peft.tuners.shira.mask_functions import random_mask

    layer = torch.nn.Linear(24, 16)
    ours, theirs = peft_adapters._random_mask(layer, 3), random_mask(layer, 3)
    assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
    assert ours.sum() == theirs.sum() == 3 * (24 + 16)

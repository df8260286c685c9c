"""Per-neuron sums of element-wise weight terms.

Every process computes what its own range of each weight contributes (`ShardLayout`), and one
reduction adds the results up: no weight is ever gathered, and all processes get the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch

from ..distributed.processes import process_rank, sum_over_processes
from ..distributed.shards import Block, local_shard
from ..tuner.layer import SpftLinear
from .base import wide_dtype

# Elements of a weight that are worked on together: bounds the extra memory.
_BLOCK_ELEMENTS = 2**17
Terms = Callable[[str, torch.Tensor, Block], Iterable[torch.Tensor]]


def sum_over_inputs(
    layers: dict[str, SpftLinear],
    terms: Terms,
    kinds: int = 1,
    block_elements: int = _BLOCK_ELEMENTS,
) -> dict[str, torch.Tensor]:
    """For each neuron the sums over its inputs of one or several kinds of terms.

    Args:
        terms: from layer name, a rectangle of its stored weight in fp32 (fp64 stays) and that
            rectangle's place, to tensors of the rectangle's shape, one a kind. They are consumed
            one by one, so a generator keeps no more than one of them alive.
        kinds: how many.
        block_elements: size of a rectangle at most, but for a single row.

    Returns:
        Layer name -> float64 (kinds, d_out) on the CPU.
    """
    sums = {
        name: _layer_sums(name, layer, terms, kinds, block_elements)
        for name, layer in layers.items()
    }
    return {name: total.cpu() for name, total in sum_over_processes(sums).items()}


@torch.no_grad()
def _layer_sums(
    name: str, layer: SpftLinear, terms: Terms, kinds: int, block_elements: int
) -> torch.Tensor:
    layout = layer.shard_layout()
    weight = layer.dense_weight()
    local = local_shard(weight, layout)
    wide = wide_dtype(weight.device)
    sums = torch.zeros(kinds, layer.out_features, dtype=wide, device=weight.device)
    for block in layout.blocks(process_rank(), max(1, block_elements // layout.columns)):
        piece = block.of(local).to(weight.device)
        piece = piece if piece.dtype == torch.float64 else piece.float()
        for kind, values in enumerate(terms(name, piece, block)):
            if layout.neurons_are_columns:
                sums[kind, block.column : block.column_stop] += values.sum(dim=0).to(wide)
            else:
                sums[kind, block.row : block.row_stop] += values.sum(dim=1).to(wide)
    return sums.double() if wide == torch.float64 else sums.cpu().double()

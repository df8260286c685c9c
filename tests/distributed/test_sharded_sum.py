"""ShardedSums with 2 and 3 real processes that add in different orders, twice, or not at all:
nobody hangs, every process ends with its own range of the sum over all of them, error one rounding
a term."""

from __future__ import annotations

import pytest
import torch
from forked import launch
from sums_worker import ADDITIONS, SHAPES, addition


@pytest.mark.parametrize("world", [2, 3])
def test_sums_are_those_of_all_processes(tmp_path, world):
    ranks = launch("sums_worker.py", tmp_path, world)
    for name, shape in SHAPES.items():
        expected = torch.zeros(shape, dtype=torch.float64)
        for rank in range(world):
            for batch, names in enumerate(ADDITIONS[rank]):
                for number, added in enumerate(names):
                    if added == name:
                        expected += addition(rank, batch, number, name)
        whole = torch.cat([rank[name] for rank in ranks])[: expected.numel()]
        assert (whole - expected.flatten()).abs().max() <= 30 * 2**-24 * expected.max()

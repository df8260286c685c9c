"""One process of a run that adds to ShardedSums in its own order, and as often as it likes."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from processes import hand_over

from trainer_ext.distributed.shards import ShardLayout
from trainer_ext.importance.sharded_sum import ShardedSums

SHAPES = {"a": (5, 3), "b": (4, 4), "c": (1, 2), "d": (7, 1)}
# What each process adds in each batch, in this order.
ADDITIONS = {
    0: ["dcba", "dcbadcba", "db", "", "dcba", "acdb"],
    1: ["dcba", "dcba", "a", "bb", "dcba", "dcba"],
    2: ["abcd", "dba", "", "c", "dcba", ""],
}


def addition(rank: int, batch: int, number: int, name: str) -> torch.Tensor:
    generator = torch.Generator().manual_seed(10_000 * rank + 100 * batch + number)
    return torch.rand(SHAPES[name], generator=generator)


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    assert world in (2, 3)
    layouts = {}
    for name, (rows, columns) in SHAPES.items():
        layouts[name] = ShardLayout(rows, columns, False, world, -(-rows * columns // world), "")
    sums = ShardedSums(layouts, {name: torch.device("cpu") for name in SHAPES})
    for batch, names in enumerate(ADDITIONS[rank]):
        if batch == 0:
            for name in reversed(names):
                sums.expect(name)
        for number, name in enumerate(names):
            tensor = addition(rank, batch, number, name)
            sums.add(name, lambda out, t=tensor: out.add_(t), lambda out, t=tensor: out.copy_(t))
        sums.finish()
    hand_over(sums.sums, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

"""One process that issues known collectives inside tests/support/traffic.py's counter, and saves
what that noted of each.

    counter_worker.py FOLDER
"""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from pathlib import Path

import torch
import torch.distributed as dist
from processes import hand_over
from torch.distributed import _functional_collectives as functional
from torch.distributed._composable.fsdp import fully_shard
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from traffic import Traffic


def collectives(world: int) -> dict:
    """Name -> what issues it."""
    mesh = init_device_mesh("cpu", (world,))
    sharded = distribute_tensor(torch.ones(4 * world), mesh, [Shard(0)])
    ddp = DistributedDataParallel(torch.nn.Linear(7, 5))
    for _ in range(2):  # the second arranges the buckets anew
        ddp(torch.ones(2, 7)).sum().backward()
    fsdp = fully_shard(torch.nn.Linear(6, 8 * world, bias=False), mesh=mesh)

    def coalesced():
        with dist._coalescing_manager(async_ops=True) as manager:
            dist.all_reduce(torch.ones(3))
            dist.all_reduce(torch.ones(4))
        manager.wait()

    def wait(work):
        work.wait()

    return {
        "all_reduce": lambda: dist.all_reduce(torch.ones(10, dtype=torch.float64)),
        "async": lambda: wait(dist.all_reduce(torch.ones(10), async_op=True)),
        "coalesced": coalesced,
        "functional": lambda: functional.all_reduce(torch.ones(6), "sum", mesh).sum(),
        "all_gather": lambda: dist.all_gather(
            [torch.empty(3) for _ in range(world)], torch.ones(3)
        ),
        "all_gather_into_tensor": lambda: dist.all_gather_into_tensor(
            torch.empty(3 * world), torch.ones(3)
        ),
        "functional_gather": lambda: functional.all_gather_tensor(torch.ones(3), 0, mesh).sum(),
        "reduce_scatter_tensor": lambda: dist.reduce_scatter_tensor(
            torch.empty(2), torch.ones(2 * world)
        ),
        "broadcast": lambda: dist.broadcast(torch.ones(9, dtype=torch.bool), 0),
        "all_gather_object": lambda: dist.all_gather_object([None] * world, "neuron"),
        "barrier": dist.barrier,
        "dtensor": lambda: (sharded.sum() + 1).full_tensor(),
        "ddp": lambda: ddp(torch.ones(2, 7)).sum().backward(),
        "fsdp2": lambda: fsdp(torch.ones(2, 6)).sum().backward(),
    }


def main(folder: Path) -> None:
    dist.init_process_group("gloo")
    found = {}
    for name, issue in collectives(dist.get_world_size()).items():
        traffic = Traffic()
        with traffic:
            issue()
        found[name] = [asdict(call) for call in traffic.calls]
    hand_over(found, folder)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main(Path(sys.argv[1]))

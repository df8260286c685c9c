"""One process of `axolotl train`, in this interpreter as its command line calls it, with what
DeepSpeed and FSDP2 need on a CPU.

    axolotl_worker.py FOLDER ENGINE YAML
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist
from accelerate.parallelism_config import ParallelismConfig
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from cpu_processes import average_micro_batches_alone, expect_no_gpu
from engine_worker import start
from run_worker import Look


def offer_gloo() -> None:
    """Axolotl asks for accelerators; without one accelerate would think itself alone."""
    prepare = PartialState._prepare_backend

    def with_gloo(self, *args, **kwargs):
        backend, kind = prepare(self, *args, **kwargs)
        if backend is None and "LOCAL_RANK" in os.environ:
            return "gloo", DistributedType.MULTI_CPU
        return backend, kind

    PartialState._prepare_backend = with_gloo
    build = ParallelismConfig.build_device_mesh
    ParallelismConfig.build_device_mesh = lambda self, device: build(self, "cpu")


def main(folder: Path, engine: str, yaml: str) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    os.environ["AXOLOTL_TEE_STDOUT"] = "0"
    offer_gloo()
    expect_no_gpu()
    start(engine)
    from axolotl.cli.train import do_cli
    from axolotl.integrations.base import PluginManager

    create = PluginManager.post_trainer_create
    looks = []

    def and_look(self, cfg, trainer):
        create(self, cfg, trainer)
        average_micro_batches_alone(trainer)
        looks.append(Look(trainer, engine, world))
        trainer.add_callback(looks[0])

    with (
        mock.patch.object(PluginManager, "post_trainer_create", and_look),
        mock.patch.object(sys, "argv", ["axolotl"]),
    ):
        do_cli(yaml)
    trainer = looks[0].trainer
    torch.save(
        {
            "losses": [e["loss"] for e in trainer.state.log_history if "loss" in e],
            "steps": looks[0].steps,
        },
        folder / f"rank{rank}.pt",
    )
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])

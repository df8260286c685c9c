"""One process of a script that names no engine, under the environment that a configuration of
`accelerate launch` makes.

    accelerate_worker.py FOLDER ENGINE OPTIONS ENVIRONMENT

ENGINE is what it is to lead to, ENVIRONMENT its variables as JSON. See run_worker.py.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from engine_worker import start
from run_worker import Look, Options, make_trainer


def main(folder: Path, engine: str, options: Options, environment: dict[str, str]) -> None:
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    start(engine)
    os.environ.update(environment)
    trainer = make_trainer("none", options, world)
    look = Look(trainer, engine, world)
    trainer.add_callback(look)
    trainer.train()
    torch.save({"steps": look.steps}, folder / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(
        Path(sys.argv[1]), sys.argv[2], Options(**json.loads(sys.argv[3])), json.loads(sys.argv[4])
    )

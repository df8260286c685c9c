"""One process of SpftTrainer runs on simulated hosts, one run after another.

    two_hosts_worker.py FOLDER JOBS

JOBS is a JSON list of [engine, options of run_worker.py, step]. When `step` steps are done, the
host of rank 1 loses its network; null: never.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState
from engine_worker import start
from hosts import CABLE
from run_worker import Look, Options, make_trainer
from transformers import TrainerCallback

from trainer_ext.guard import RunGuard
from trainer_ext.trainer_batches import bare_model
from trainer_ext.tuner.model import deltas

RANK = int(os.environ["RANK"])
WORLD = int(os.environ["WORLD_SIZE"])


class Unplugged(TrainerCallback):
    """Takes this host off the network in the middle of a run."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            subprocess.run(["ip", "link", "set", CABLE, "down"], check=True)


def run(engine: str, options: Options, unplug_at: int | None) -> dict:
    start(engine)
    RunGuard.interval, RunGuard.dead_after = 0.2, 4.0
    trainer = make_trainer(engine, options, WORLD)
    look = Look(trainer, engine, WORLD)
    trainer.add_callback(look)
    if unplug_at is not None and RANK == 1:
        trainer.add_callback(Unplugged(unplug_at))
    trainer.train(resume_from_checkpoint=options.resume)
    trainer.save_model()
    result = {
        "index": {name: delta.index for name, delta in deltas(bare_model(trainer)).items()},
        "losses": [e["loss"] for e in trainer.state.log_history if "loss" in e],
        "steps": look.steps,
    }
    # the process group stays: its store would hold the addresses of the one before
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    del trainer, look
    gc.collect()
    return result


def main(folder: Path, jobs: list) -> None:
    results = {e: run(e, Options(**options), at) for e, options, at in jobs}
    torch.save(results, folder / f"rank{RANK}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))

"""One process of SpftTrainer runs on simulated hosts, one run after another.

    two_hosts_worker.py FOLDER JOBS

JOBS is a JSON list of [engine, options of run_worker.py, fate]. "unplugged 5": when 5 steps are
done, the host of rank 1 loses its network; "killed 5": its process dies, if torchrun has not
restarted it yet; null: nothing happens.
"""

from __future__ import annotations

import gc
import json
import os
import signal
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

from trainer_ext.checkpoints.folders import last_complete
from trainer_ext.distributed.engine import bare_model
from trainer_ext.run_guard.guard import RunGuard
from trainer_ext.tuner.model import deltas

RANK = int(os.environ["RANK"])
WORLD = int(os.environ["WORLD_SIZE"])


class Fate(TrainerCallback):
    """What happens to rank 1 in the middle of a run."""

    def __init__(self, fate: str) -> None:
        self.what, step = fate.split()
        self.step = int(step)

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step != self.step:
            return
        if self.what == "unplugged":
            subprocess.run(["ip", "link", "set", CABLE, "down"], check=True)
        elif os.environ["TORCHELASTIC_RESTART_COUNT"] == "0":
            os.kill(os.getpid(), signal.SIGKILL)


def run(engine: str, options: Options, fate: str | None) -> dict:
    start(engine)
    RunGuard.interval, RunGuard.dead_after = 0.2, 4.0
    trainer = make_trainer(engine, options, WORLD)
    look = Look(trainer, engine, WORLD)
    trainer.add_callback(look)
    if fate is not None and RANK == 1:
        trainer.add_callback(Fate(fate))
    resume = last_complete(options.out) if options.resume == "auto" else options.resume
    trainer.train(resume_from_checkpoint=resume)
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
    results = {e: run(e, Options(**options), fate) for e, options, fate in jobs}
    torch.save(results, folder / f"rank{RANK}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))

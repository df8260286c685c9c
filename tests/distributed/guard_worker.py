"""One process of a run in which rank 1 goes astray.

    guard_worker.py FOLDER whole|killed|resumed|hanging

`whole` first sees another learning rate and a corrupted delta refused, then trains to the end,
saves what came of it, and last fails by an ordinary exception on rank 1.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from tiny_models import dataset, tiny_model
from transformers import TrainerCallback, TrainingArguments

from trainer_ext import SpftConfig, SpftError, SpftTrainer
from trainer_ext.run_guard.guard import RunGuard
from trainer_ext.tuner.model import deltas

RANK = int(os.environ["RANK"])
LEARNING_RATE, OTHER_RATE = 1e-2, 2e-2


class Astray(SpftTrainer):
    """Does something else than training in the middle of step 3 on rank 1."""

    instead = None

    def training_step(self, *args, **kwargs):
        if RANK == 1 and self.instead and self.state.global_step == 2:
            self.instead()
        return super().training_step(*args, **kwargs)


class Corrupted(TrainerCallback):
    """Flips the last bit of one weight of rank 1 in the first layer, in step 2."""

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if RANK == 1 and state.global_step == 1:
            weight = next(iter(deltas(model).values())).weight
            weight.data.view(torch.int32)[0, 0] ^= 1


def trainer(folder: Path, callbacks=(), **more) -> Astray:
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    RunGuard.interval = 0.2
    arguments = {
        "max_steps": 5,
        "save_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": LEARNING_RATE,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
        **more,
    }
    return Astray(
        tiny_model(),
        TrainingArguments(str(folder), **arguments),
        train_dataset=dataset(),
        spft_config=SpftConfig(r=4, calibration_batches=2),
        callbacks=list(callbacks),
    )


def refused(run: Astray) -> None:
    try:
        run.train()
    except SpftError as error:
        print(f"refused: {error}", file=sys.stderr)


def save(run: Astray, folder: Path) -> None:
    values = {name: delta.weight.detach() for name, delta in deltas(run.model).items()}
    torch.save(values, folder / f"rank{RANK}.pt")


def fail() -> None:
    raise RuntimeError("the data is gone")


def main(folder: Path, mode: str) -> None:
    # accelerate's name for a process's CPU, by which the Trainer loads an optimizer's state
    torch.serialization.register_package(
        1, lambda storage: None, lambda storage, where: storage if where[:4] == "cpu:" else None
    )
    if mode == "whole":
        refused(trainer(folder / "rate", learning_rate=OTHER_RATE if RANK else LEARNING_RATE))
        refused(trainer(folder / "corrupted", callbacks=[Corrupted()]))
    run = trainer(folder / ("run" if mode in ("killed", "resumed") else mode))
    if mode == "killed":
        run.instead = lambda: os.kill(os.getpid(), signal.SIGKILL)
    elif mode == "hanging":
        RunGuard.hang_after = 4.0  # a machine may be busy
        run.instead = lambda: time.sleep(1000)
    run.train(resume_from_checkpoint=mode == "resumed")
    save(run, folder)
    if mode == "whole":
        run = trainer(folder / "raised")
        run.instead = fail
        run.train()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

"""One process of a DDP run on CPU: trains a tiny model by SPFT and saves what it ended with."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch
from accelerate.utils import DistributedType
from tiny_models import dataset, tiny_model
from transformers import TrainingArguments

from trainer_ext import ImportanceScores, SpftConfig, SpftTrainer
from trainer_ext.trainer import IMPORTANCE_FILE
from trainer_ext.tuner.model import deltas

GLOBAL_BATCH = 12


def main(folder: Path) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    arguments = TrainingArguments(
        str(folder / "out"),
        max_steps=3,
        per_device_train_batch_size=GLOBAL_BATCH // world,
        learning_rate=1e-2,
        adam_epsilon=1e-3,  # well above gradient noise: a rounding error must not become a step
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        seed=3,
    )
    trainer = SpftTrainer(
        tiny_model(),
        arguments,
        train_dataset=dataset(48),
        spft_config=SpftConfig(r=4, calibration_batches=2),
    )
    trainer.train()
    # launch modes silently fall back to one process: prove that this one did not
    kind = trainer.accelerator.distributed_type
    assert kind == (DistributedType.MULTI_CPU if world > 1 else DistributedType.NO), kind
    assert trainer.accelerator.num_processes == world
    if world > 1:
        assert torch.distributed.get_world_size() == world
        torch.distributed.barrier()
    result = {
        "index": {n: d.index for n, d in deltas(trainer.model).items()},
        "delta": {n: d.weight.detach() for n, d in deltas(trainer.model).items()},
        "scores": ImportanceScores.load(folder / "out" / IMPORTANCE_FILE).scores,
        "losses": [e["loss"] for e in trainer.state.log_history if "loss" in e],
    }
    torch.save(result, folder / f"rank{trainer.accelerator.process_index}.pt")
    if world > 1:
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))

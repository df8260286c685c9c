"""One process of a DDP run on CPU whose batches carry classes; saves what each process saw."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from accelerate.utils import DistributedType
from processes import hand_over
from tiny_models import dataset, tiny_model
from transformers import TrainingArguments

from trainer_ext import SpftConfig, SpftTrainer
from trainer_ext.config.registry import METRICS
from trainer_ext.importance.class_column import CLASS_KEY
from trainer_ext.importance.metrics.quantile_mean import QuantileMean

GLOBAL_BATCH = 8
SEEN = {"calibration": [], "training": [], "model": set()}


class Noting(QuantileMean):
    """Notes the classes of every calibration batch."""

    def observe(self, run_batch):
        super().observe(run_batch)
        SEEN["calibration"].append(self.row_classes.current.clone())


class Watched(SpftTrainer):
    def training_step(self, model, inputs, *args, **kwargs):
        SEEN["training"].append((inputs["input_ids"][:, 0].clone(), inputs[CLASS_KEY].clone()))
        return super().training_step(model, inputs, *args, **kwargs)


def main(folder: Path) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    METRICS["quantile_mean"] = Noting
    arguments = TrainingArguments(
        str(folder / "out"),
        max_steps=2,
        per_device_train_batch_size=GLOBAL_BATCH // world,
        eval_strategy="steps",
        eval_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
    )
    # a row's class is the remainder of its number, which is its first token
    rows = [{**row, "kind": f"kind {i % 3}"} for i, row in enumerate(dataset(24))]
    config = SpftConfig(r=4, importance="quantile_mean", class_field="kind", calibration_batches=2)
    trainer = Watched(
        tiny_model(), arguments, train_dataset=rows, eval_dataset=rows[:8], spft_config=config
    )
    forward = trainer.model.forward

    def watched(*args, **kwargs):
        SEEN["model"].update(kwargs)
        return forward(*args, **kwargs)

    trainer.model.forward = watched
    trainer.train()
    kind = trainer.accelerator.distributed_type
    assert kind == (DistributedType.MULTI_CPU if world > 1 else DistributedType.NO), kind
    SEEN["model"] = sorted(SEEN["model"])
    hand_over(SEEN, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

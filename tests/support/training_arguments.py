"""Arguments of short runs by a trainer."""

from __future__ import annotations

from transformers import TrainingArguments


def arguments(folder, **more) -> TrainingArguments:
    """Four steps on the CPU that log each loss and save nothing, but for what `more` says."""
    settings = {
        "max_steps": 4,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
    }
    return TrainingArguments(str(folder), **{**settings, **more})

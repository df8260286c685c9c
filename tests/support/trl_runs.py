"""Tiny data and arguments for TRL's trainers."""

from __future__ import annotations

import torch
from datasets import Dataset
from tiny_models import byte_tokenizer

from trainer_ext import SpftDPOTrainer
from trainer_ext.tuner.model import deltas, spft_layers

_WORDS = ("red", "a bee", "seven", "north", "olive oil", "to go", "xyz", "ninety-nine")


def _pair(i: int) -> dict[str, str]:
    """Completions of different lengths, so that every batch is padded."""
    n = len(_WORDS)
    return {
        "prompt": f"say {_WORDS[i % n]}: ",
        "chosen": _WORDS[i % n] * (1 + i % 3),
        "rejected": _WORDS[(3 * i + 5) % n],
    }


def pairs(count: int = 24) -> Dataset:
    """Preference pairs."""
    return Dataset.from_list([_pair(i) for i in range(count)])


def completions(count: int = 24) -> Dataset:
    """Prompts with completions, good and bad ones in turn under `label`."""
    rows = [_pair(i) for i in range(count)]
    return Dataset.from_list(
        [
            {
                "prompt": row["prompt"],
                "completion": row["rejected" if i % 2 else "chosen"],
                "label": i % 2 == 0,
            }
            for i, row in enumerate(rows)
        ]
    )


def arguments(kind: type, output_dir, **more):
    """Arguments of a TRL trainer for a few steps on one process, without dropout or rounding."""
    return kind(
        **{
            "output_dir": str(output_dir),
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "gradient_accumulation_steps": 2,
            "learning_rate": 1e-2,
            "max_grad_norm": 0.0,
            "logging_steps": 1,
            "report_to": [],
            "use_cpu": True,
            "bf16": False,
            "save_strategy": "no",
            "disable_tqdm": True,
            **more,
        }
    )


def compact(model) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Copies of each layer's index and delta."""
    return {n: (d.index.clone(), d.weight.detach().clone()) for n, d in deltas(model).items()}


class NotingDPOTrainer(SpftDPOTrainer):
    """Keeps each micro-batch that it trains or evaluates on, with the deltas of that moment.

    Those of calibration are forgotten with all else that a trainer keeps meanwhile.
    """

    def __init__(self, *args, **kwargs):
        self.notes: list[dict] = []
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        written = {layer.written is not None for layer in spft_layers(model).values()}
        note = {**inputs, "deltas": compact(model), "written": written}
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.notes.append({**note, "loss": loss.item()})
        return loss


def losses(trainer) -> list[float]:
    """What a trainer has logged, one a step."""
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(logged) == trainer.state.global_step
    return logged


tokenizer = byte_tokenizer()

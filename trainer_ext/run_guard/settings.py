"""What all processes of a run must have in common before they begin to train."""

from __future__ import annotations

import dataclasses
import hashlib
import json

from torch import nn
from transformers import Trainer

from ..distributed.engines import engine_of
from ..distributed.shards import whole_shape
from ..tuner.model import is_selected
from ..versions import package_versions
from .agreement import Fact

# What changes a run's numbers. Names that a version of transformers does not know are left out.
_ARGUMENTS = (
    "learning_rate",
    "max_steps",
    "num_train_epochs",
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "seed",
    "data_seed",
    "weight_decay",
    "optim",
    "optim_args",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "warmup_ratio",
    "max_grad_norm",
    "bf16",
    "fp16",
    "gradient_checkpointing",
    "label_smoothing_factor",
    "average_tokens_across_devices",
)
# Where files lie may differ; what was read from them is compared after the selection.
_OWN_FIELDS = {
    "base_model_name_or_path",
    "revision",
    "auto_mapping",
    "importance_file",
    "start_adapter",
}


def run_facts(trainer: Trainer, model: nn.Module, adapter_name: str) -> dict[str, Fact]:
    """Settings, versions and shapes that are the same on all processes of a run.

    Versions come first: where they differ, they explain the rest. Base weights are left out, since
    DDP and DeepSpeed give everyone rank 0's.

    Args:
        trainer: prepared and about to train, at its first step or at the one it resumes from.
    """
    facts: dict[str, Fact] = {f"version of {n}": v for n, v in package_versions().items()}
    facts["engine"] = engine_of(trainer).name
    config = model.peft_config[adapter_name]
    for field in dataclasses.fields(config):
        if field.name not in _OWN_FIELDS:
            facts[f"`{field.name}`"] = _short(getattr(config, field.name))
    for name in _ARGUMENTS:
        if hasattr(trainer.args, name):
            facts[name] = _short(getattr(trainer.args, name))
    facts["number of optimizer steps"] = trainer.state.max_steps
    facts["the step that the run goes on from"] = trainer.state.global_step
    facts["the neurons are selected"] = is_selected(model, adapter_name)
    shapes = {
        name: [str(p.dtype), *whole_shape(p)]
        for name, p in model.named_parameters()
        if p.requires_grad
    }
    facts["set of trained parameters"] = f"{len(shapes)} tensors {_digest(shapes)}"
    return facts


def _short(value) -> Fact:
    """A setting as it stands, or a digest of a long one."""
    if isinstance(value, (int, float, bool, type(None))):
        return value
    if isinstance(value, (set, frozenset)):
        value = sorted(value)
    text = getattr(value, "value", value)  # of an enum
    text = text if isinstance(text, str) else json.dumps(text, default=str)
    return text if len(text) <= 60 else f"{text[:40]}... (digest {_digest(text)})"


def _digest(value) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=4).hexdigest()

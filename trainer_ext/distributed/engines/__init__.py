"""The engines that SPFT trains under, one file each; every file in this folder is imported."""

from __future__ import annotations

import importlib
import pkgutil

from torch import nn
from transformers import Trainer

from ...errors import SpftError
from ..engine import Engine
from ..processes import world_size
from .ddp import DDP

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

ENGINES = tuple(Engine.__subclasses__())


def engine_of(trainer: Trainer) -> Engine:
    """The engine of a trainer, as soon as it has been constructed.

    Raises:
        SpftError: SPFT does not train under it.
    """
    if trainer.args.n_gpu > 1:
        raise SpftError(
            "SPFT does not train under torch.nn.DataParallel; start one process a GPU "
            "(accelerate launch --multi_gpu), or show one GPU by CUDA_VISIBLE_DEVICES"
        )
    found = (kind.of(trainer) for kind in ENGINES)
    engine = next((engine for engine in found if engine is not None), None)
    return engine or (DDP() if world_size() > 1 else Engine())


def release_gathered_weights(model: nn.Module, wrapped: nn.Module | None = None) -> None:
    """Let whichever engine shard again what passes outside of its own schedule have gathered.

    Args:
        wrapped: the trainer's prepared model, if there is a trainer.
    """
    for kind in ENGINES:
        kind.release_gathered_weights(model, wrapped)

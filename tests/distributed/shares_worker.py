"""One process of a run that looks at what it holds: gradients of the compact rows when a step is
about to be made, whole base weights in the calibration, and what saving takes.

    shares_worker.py FOLDER ENGINE OPTIONS        as run_worker.py
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from engine_worker import start
from memory import StorageTracker
from run_worker import Look, Options, make_trainer
from transformers import TrainerCallback

from trainer_ext.distributed.engine import bare_model
from trainer_ext.tuner.layer import SpftLinear


def gradient_bytes(trainer) -> int:
    """Of the compact rows: where autograd leaves them, and where ZeRO keeps its share."""
    named = bare_model(trainer).named_parameters()
    grads = [p.grad for _, p in named if p.requires_grad and p.grad is not None]
    zero = getattr(trainer.optimizer, "optimizer", None)
    parts = getattr(zero, "averaged_gradients", {}).values()
    if hasattr(zero, "grad_position"):  # ZeRO-3
        grads.append(zero.grad_partitions_flat_buffer)
    else:
        grads += [t for part in parts if part is not None for t in part]
    found = [g.to_local() if hasattr(g, "to_local") else g for g in grads]
    return sum(g.nbytes for g in found)


class BeforeSteps(TrainerCallback):
    """Measures gradients just before DeepSpeed's own step, or the optimizer's."""

    def __init__(self, trainer) -> None:
        self.trainer, self.seen = trainer, []

    def on_step_begin(self, args, state, control, **kwargs):
        engine = getattr(self.trainer, "deepspeed", None)
        if engine is None or self.seen:
            return
        step = engine.step

        def measured(*arguments, **named):
            self.seen.append(gradient_bytes(self.trainer))
            return step(*arguments, **named)

        engine.step = measured

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if not self.trainer.is_deepspeed_enabled:
            self.seen.append(gradient_bytes(self.trainer))


def whole_layers(model) -> int:
    """SPFT layers whose base weights this process holds whole."""
    layers = [m.get_base_layer() for m in model.modules() if isinstance(m, SpftLinear)]
    # not as attributes: that is how DeepSpeed sees that a weight is needed, and gathers it
    weights = [next(iter(layer._parameters.values())) for layer in layers]
    return sum(w.numel() == getattr(w, "ds_numel", w.numel()) for w in weights)


def watch_calibration(trainer) -> list[int]:
    """Whole layers, looked at as often as a layer computes, forward and backward."""
    most: list[int] = []
    model = trainer.model

    def look(*_):
        if all_layers[0].calibrating:
            most.append(whole_layers(model))

    all_layers = [m for m in model.modules() if isinstance(m, SpftLinear)]
    for layer in all_layers:
        layer.get_base_layer().register_forward_hook(look)  # before DeepSpeed's, which frees it
        layer.register_forward_hook(look)
        layer.register_full_backward_hook(look)
    return most


def main(folder: Path, engine: str, options: Options) -> None:
    world, rank = int(os.environ["WORLD_SIZE"]), int(os.environ["RANK"])
    start(engine)
    trainer = make_trainer(engine, options, world)
    steps = BeforeSteps(trainer)
    trainer.add_callback(steps)
    trainer.add_callback(Look(trainer, engine, world))
    most = watch_calibration(trainer)
    trainer.train()
    trained = [p for p in bare_model(trainer).parameters() if p.requires_grad]
    with StorageTracker() as tracker:
        trainer.save_model()
        trainer._save_optimizer_and_scheduler(options.out)
    result = {
        "gradients": steps.seen,
        "numel": [getattr(p, "ds_numel", p.numel()) for p in trained],
        "most_whole": max(most, default=0),
        "looks": len(most),
        "whole_after": whole_layers(trainer.model),
        "layers": sum(isinstance(m, SpftLinear) for m in trainer.model.modules()),
        "saving": tracker.peak_bytes,
    }
    torch.save(result, folder / f"rank{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Options(**json.loads(sys.argv[3])))

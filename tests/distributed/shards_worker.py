"""One process that calibrates without a trainer: under FSDP2's fully_shard, or replicated with a
layer that runs on some processes only.

    shards_worker.py FOLDER fsdp2|unused|memory
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import calibrations
import torch
import torch.distributed as dist
from adapters import wrapped
from memory import StorageTracker
from oracles import weights
from peft import get_peft_model
from processes import hand_over
from tiny_models import batch, few_tokens, tiny_model, wide_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from trainer_ext import SpftConfig, measure_importance, select_by_scores
from trainer_ext.importance import noise
from trainer_ext.importance.class_column import CLASS_KEY
from trainer_ext.importance.metrics import zo_taylor
from trainer_ext.tuner.model import deltas, spft_layers

# a tiny weight takes several chunks of noise, and the processes' ranges cut through them
noise.CHUNK_ELEMENTS = zo_taylor.CHUNK_ELEMENTS = 200
METRICS = ("magnitude", "random", "wanda", "group_taylor", "taylor", "zo_taylor", "quantile_mean")
ROWS, BATCHES = 6, 3


def global_batches(classes: bool) -> list[dict]:
    found = []
    for seed in range(BATCHES):
        inputs = batch(seed, rows=ROWS, padding=True)
        if classes:
            inputs[CLASS_KEY] = torch.arange(ROWS) % 3
        found.append(inputs)
    return found


def runs(model, world: int, rank: int, classes: bool = False):
    """This process's rows of each batch; the loss as the trainer has it, so that the mean over the
    processes is the mean over all target tokens."""
    for inputs in global_batches(classes):
        targets = int((inputs["labels"][:, 1:] != -100).sum())
        mine = {name: tensor[rank::world] for name, tensor in inputs.items()}

        def run_batch(backward, mine=mine, targets=targets):
            loss = model(**mine, num_items_in_batch=targets).loss * world
            if backward:
                loss.backward()
            return loss.detach()

        yield run_batch


def sharded(model, world: int):
    """FSDP2 as trainers set it up: every block a unit, and the root."""
    if world == 1:
        return model
    mesh = init_device_mesh("cpu", (world,))
    for block in model.get_base_model().model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    assert isinstance(model, FSDPModule)
    assert all(p.device_mesh.size() == world for p in model.parameters())
    return model


def under_fsdp2(world: int, rank: int) -> dict:
    results = {}
    for metric in METRICS:
        for checkpointing in (None, True, False) if metric.endswith("taylor") else (None,):
            model = wrapped(importance=metric, class_field="topic", zo_directions=2)
            if checkpointing is not None:
                model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
            sharded(model, world)
            batches = runs(model, world, rank, metric == "quantile_mean")
            scores = measure_importance(model, batches)
            select_by_scores(model, scores)
            results[f"{metric} {checkpointing}"] = {
                "scores": scores.scores,
                "index": {name: delta.index.clone() for name, delta in deltas(model).items()},
            }
    results["rewritten"] = rewritten(model, runs(model, world, rank))
    return results


def rewritten(model, batches) -> dict:
    """Rows before and after writing them, and what the model computes then."""
    index = torch.tensor([0, 5, 11])
    layers = spft_layers(model)
    before = {name: layer.rows(index) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.write_rows(index, before[name] + 0.1)
    after = {name: layer.rows(index) for name, layer in layers.items()}
    untouched = {name: layer.rows(torch.tensor([1, 12])) for name, layer in layers.items()}
    with torch.no_grad():
        model.eval()
        loss = next(batches)(False)
    if dist.is_initialized():
        dist.all_reduce(loss)
        loss /= dist.get_world_size()
    return {"before": before, "after": after, "untouched": untouched, "loss": loss}


def with_an_unused_layer(world: int, rank: int) -> dict:
    """The second block's MLP runs on the last process only, as a conditional layer may."""

    def conditional(model):
        if rank < world - 1:
            (
                model if not hasattr(model, "get_base_model") else model.get_base_model()
            ).model.layers[1].mlp.forward = lambda x: x
        return model

    results = {}
    for metric in ("group_taylor", "taylor"):
        model = conditional(wrapped(importance=metric))
        found = measure_importance(model, runs(model, world, rank))
        results[metric] = {"scores": found.scores, "silent": found.silent_layers}
    # plain autograd on dense weights, averaged as DDP does
    base, dense = conditional(tiny_model()), weights(tiny_model())
    gradients = {name: torch.zeros_like(weight) for name, weight in dense.items()}
    for run_batch in runs(base, world, rank):
        base.zero_grad()
        run_batch(True)
        for name in gradients:
            grad = base.get_submodule(name).weight.grad
            gradients[name] += 0 if grad is None else grad
    for gradient in gradients.values():
        dist.all_reduce(gradient)
    products = {n: dense[n].double() * g.double() / BATCHES / world for n, g in gradients.items()}
    results["expected"] = {
        "taylor": {name: product.abs().sum(dim=1) for name, product in products.items()},
        "group_taylor": {name: product.sum(dim=1).abs() for name, product in products.items()},
    }
    return results


def bytes_of_taylor(world: int, rank: int) -> dict:
    """Peak tensor bytes of a calibration, transients included, and the layers' sizes."""

    def peak(importance: str, stability: bool) -> int:
        config = SpftConfig(r=4, importance=importance, stability=stability)
        model = get_peft_model(wide_model(), config)
        with StorageTracker() as tracker:
            measure_importance(model, calibrations.runs(model, few_tokens()))
        return tracker.peak_bytes

    layers = spft_layers(get_peft_model(wide_model(), SpftConfig(r=4))).values()
    return {
        "sizes": [layer.in_features * layer.out_features for layer in layers],
        "extra": {
            halves: peak("taylor", halves == 2) - peak("group_taylor", halves == 2)
            for halves in (1, 2)
        },
    }


MODES = {"fsdp2": under_fsdp2, "unused": with_an_unused_layer, "memory": bytes_of_taylor}


def main(folder: Path, what: str) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    if world > 1:
        dist.init_process_group("gloo")
        assert dist.get_world_size() == world
    hand_over(MODES[what](world, rank), folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

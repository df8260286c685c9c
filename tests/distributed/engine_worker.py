"""One process of a run under an engine: for every metric, calibrates a tiny model through the live
engine, trains a few steps, and saves scores, neurons and losses.

    engine_worker.py FOLDER none|ddp|zero2|zero3|zero3_default|fsdp2
"""

from __future__ import annotations

import gc
import os
import sys
from importlib import import_module
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from processes import hand_over
from tiny_models import batch, tiny_model
from transformers import TrainerCallback, TrainingArguments

from trainer_ext import ImportanceScores, SelectedNeuronAdamW, SpftConfig, SpftTrainer
from trainer_ext.distributed.engine import bare_model
from trainer_ext.distributed.shards import ShardLayout, read_neurons
from trainer_ext.importance import noise
from trainer_ext.importance.metrics import zo_taylor
from trainer_ext.training.callback import IMPORTANCE_FILE
from trainer_ext.tuner.model import deltas, spft_layers

# a tiny weight takes several chunks of noise, and the processes' ranges cut through them
noise.CHUNK_ELEMENTS = zo_taylor.CHUNK_ELEMENTS = 200
GLOBAL_BATCH = 12
ACCUMULATION = 2
STEPS = 3
METRICS = ("magnitude", "random", "wanda", "group_taylor", "taylor", "zo_taylor", "quantile_mean")
CHECKPOINTED = ("taylor", "group_taylor")
SHARDED = ("zero3", "zero3_default", "fsdp2")


def ragged_rows(count: int = 48) -> list[dict]:
    """Rows of very different numbers of target tokens, so that the processes' shares differ."""
    data = batch(5, rows=count, length=24)
    rows = []
    for i in range(count):
        row = {name: tensor[i].clone() for name, tensor in data.items()}
        length = 4 + (i * 7) % 20
        row["attention_mask"][length:] = 0
        row["labels"][length:] = -100
        row["topic"] = i % 3
        rows.append(row)
    return rows


def config_for(metric: str) -> SpftConfig:
    more = {"class_field": "topic"} if metric == "quantile_mean" else {}
    if metric == "taylor":
        more["accumulator_offload"] = True
    return SpftConfig(r=4, importance=metric, calibration_batches=2, zo_directions=2, **more)


def train(folder: Path, engine: str, metric: str, world: int) -> dict:
    model = tiny_model()  # before the arguments, which would switch zero.Init on
    arguments = TrainingArguments(
        str(folder / metric),
        max_steps=STEPS if metric in CHECKPOINTED else 1,
        per_device_train_batch_size=GLOBAL_BATCH // ACCUMULATION // world,
        gradient_accumulation_steps=ACCUMULATION,
        gradient_checkpointing=metric in CHECKPOINTED,
        gradient_checkpointing_kwargs={"use_reentrant": True},
        learning_rate=1e-2,
        adam_epsilon=1e-3,  # well above gradient noise: a rounding error must not become a step
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        seed=3,
        max_grad_norm=0.0,
        ddp_find_unused_parameters=False,  # DDP's search does not go with reentrant checkpointing
        deepspeed=deepspeed_config(engine),
        **fsdp_arguments(engine),
    )
    rows = ragged_rows()
    if metric != "quantile_mean":
        rows = [{k: v for k, v in row.items() if k != "topic"} for row in rows]
    trainer = SpftTrainer(model, arguments, train_dataset=rows, spft_config=config_for(metric))
    forwards = NotesForward()
    trainer.add_callback(forwards)
    trainer.train()
    check_engine(trainer, engine, world)
    # where a process holds whole weights they hold the update while training, else never
    assert forwards.in_step == {engine not in SHARDED}, forwards.in_step
    layers = spft_layers(trainer.model)
    compact = {name: delta.weight for name, delta in deltas(trainer.model).items()}
    result = {
        "index": {name: delta.index for name, delta in deltas(trainer.model).items()},
        "delta": {
            name: read_neurons(weight, ShardLayout.of(weight), torch.arange(4))
            for name, weight in compact.items()
        },
        "scores": ImportanceScores.load(folder / metric / IMPORTANCE_FILE).scores,
        "losses": [e["loss"] for e in trainer.state.log_history if "loss" in e],
        "loss_after_writing": loss_after_writing(trainer, layers),
    }
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    del trainer, model, layers
    gc.collect()
    return result


class NotesForward(TrainerCallback):
    """Whether the base weights hold W0 + delta after each step, or nothing of it."""

    def __init__(self):
        self.in_step: set[bool] = set()

    def on_step_end(self, args, state, control, model=None, **kwargs):
        for layer in spft_layers(model).values():
            if layer.written is None:
                self.in_step.add(False)
                continue
            held = layer.get_base_layer().weight[layer.written.index]
            delta = layer.spft_delta["default"].weight
            assert torch.equal(held, layer.written.rows + delta)
            assert delta.abs().sum() > 0
            self.in_step.add(True)


def loss_after_writing(trainer, layers) -> torch.Tensor:
    """Of the bare model on a fixed batch, when two neurons of every layer have been overwritten."""
    index = torch.tensor([0, 5])
    for layer in layers.values():
        rows = layer.rows(index)
        layer.write_rows(index, rows + 0.1)
        assert torch.equal(layer.rows(index), rows + 0.1)
    with torch.no_grad():
        return bare_model(trainer).eval()(**batch(8)).loss


def deepspeed_config(engine: str) -> dict | None:
    if not engine.startswith("zero"):
        return None
    zero = {"stage": int(engine[4])}
    if engine in ("zero3", "zero3_streamed"):
        zero["stage3_param_persistence_threshold"] = 0  # every parameter is really partitioned
    if engine == "zero3_streamed":  # and given up after each use, as in a model too large to keep
        for name in ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size"):
            zero[f"stage3_{name}"] = 0
    return {
        "zero_optimization": zero,
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
    }


def fsdp_arguments(engine: str) -> dict:
    if engine != "fsdp2":
        return {}
    config = {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
    }
    return {"fsdp": "full_shard auto_wrap", "fsdp_config": config}


def check_engine(trainer, engine: str, world: int) -> None:
    """Launch modes silently fall back to less than was asked for: prove that this one did not."""
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):  # accelerate's wrapper, DeepSpeed's
        optimizer = optimizer.optimizer
    assert type(optimizer) is SelectedNeuronAdamW
    accelerator = trainer.accelerator
    assert accelerator.num_processes == world
    if world > 1:
        assert dist.get_world_size() == world
    if engine.startswith("zero"):
        assert accelerator.distributed_type == DistributedType.DEEPSPEED
        assert trainer.deepspeed.zero_optimization_stage() == int(engine[4])
        sharded = [hasattr(p, "ds_tensor") for p in trainer.model.parameters()]
        assert all(sharded) if engine[4] == "3" else not any(sharded)
    elif engine == "fsdp2":
        assert accelerator.distributed_type == DistributedType.FSDP
        assert accelerator.is_fsdp2
        assert all(p.device_mesh.size() == world for p in trainer.model.parameters())
    else:
        expected = DistributedType.MULTI_CPU if world > 1 else DistributedType.NO
        assert accelerator.distributed_type == expected


def offer_fsdp_on_cpu() -> None:
    """accelerate considers FSDP on accelerators only, and runs plain DDP on CPU without a word."""
    initialise = PartialState.__init__

    def as_on_gpus(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = as_on_gpus


def start(engine: str) -> None:
    """What DeepSpeed needs on CPU: gloo chosen before accelerate looks, and three fixes."""
    if engine.startswith("fsdp2"):
        offer_fsdp_on_cpu()
    if not engine.startswith("zero"):
        return
    os.environ.pop("ACCELERATE_USE_CPU", None)  # with it accelerate runs plain DDP instead
    import deepspeed
    from deepspeed.runtime.zero import partition_parameters, stage_1_and_2

    # An operator for inference: compiled for a minute, and a killed process leaves its lock behind,
    # on which all later ones wait for ever.
    import_module("deepspeed.comm.torch").build_shm_op = lambda: None
    deepspeed.init_distributed(dist_backend="gloo")
    gather = stage_1_and_2.all_gather_dp_groups

    def without_grad(*args, **kwargs):  # torch 2.13: "Output 0 of Split is a view"
        with torch.no_grad():
            return gather(*args, **kwargs)

    stage_1_and_2.all_gather_dp_groups = without_grad
    partition_parameters.dist = _GathersInOrder()


class _GathersInOrder:
    """deepspeed.comm for ZeRO-3, which gathers a layer's weight and bias and waits for the last.

    NCCL does one after the other; gloo does not, so the first may still be uninitialised memory.
    """

    def __getattr__(self, name: str):
        import deepspeed

        call = getattr(deepspeed.comm, name)
        if not name.startswith("all_gather"):
            return call

        def and_wait(*args, **kwargs):
            handle = call(*args, **kwargs)
            if handle is not None:
                handle.wait()
            return handle

        return and_wait


def main(folder: Path, engine: str) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    start(engine)
    hand_over({metric: train(folder, engine, metric, world) for metric in METRICS}, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

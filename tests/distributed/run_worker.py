"""One process of a training run as a user starts it: SpftTrainer under an engine, from the base
model's folder to the saved adapter, with checkpoints, and a death where it is asked for.

    run_worker.py FOLDER ENGINE OPTIONS

ENGINE is none, ddp, zero1, zero2, zero3 (all partitioned), zero3_default (small ones whole),
zero3_streamed (and nothing kept for longer than it is used),
zero2_offload, zero3_offload (optimizer and parameters), fsdp2 (full state dicts), fsdp2_sharded,
fsdp2_ram (loaded by one process). OPTIONS is JSON: see `Options`.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.utils import DistributedType
from deaths import arrange_death
from engine_worker import ragged_rows, start
from quantised import quantised
from transformers import AutoModelForCausalLM, TrainerCallback, TrainingArguments

from trainer_ext import ImportanceScores, SelectedNeuronAdamW, SpftConfig, SpftTrainer
from trainer_ext.checkpoints.folders import last_complete
from trainer_ext.distributed.engine import bare_model, innermost_optimizer
from trainer_ext.training.callback import IMPORTANCE_FILE
from trainer_ext.tuner.model import deltas

GLOBAL_BATCH = 12


@dataclass
class Options:
    """What to run.

    Attributes:
        base: folder of the base model.
        out: output_dir, which all processes share.
        resume: as Trainer.train takes it; "auto": from the last complete checkpoint, if any.
        bf16: train in bf16.
        die: where rank `die_rank` kills itself; see deaths.py.
        arguments: further TrainingArguments.
        config: further fields of SpftConfig.
        bits: load the base quantised, in 4 or 8 bits.
    """

    base: str
    out: str
    steps: int = 20
    resume: bool | str | None = None
    bf16: bool = False
    die: str | None = None
    die_rank: int = 0
    accumulation: int = 2
    arguments: dict = field(default_factory=dict)
    config: dict = field(default_factory=dict)
    bits: int | None = None


def deepspeed_config(engine: str, bf16: bool) -> dict | None:
    if not engine.startswith("zero"):
        return None
    zero: dict = {"stage": int(engine[4])}
    if engine[4] == "3" and not engine.endswith("default"):
        zero["stage3_param_persistence_threshold"] = 0
    if engine.endswith("streamed"):
        for name in ("max_live_parameters", "max_reuse_distance", "prefetch_bucket_size"):
            zero[f"stage3_{name}"] = 0
    if engine.endswith("offload"):
        zero["offload_optimizer"] = {"device": "cpu"}
        if engine[4] == "3":
            zero["offload_param"] = {"device": "cpu"}
    return {
        "zero_optimization": zero,
        "zero_force_ds_cpu_optimizer": False,  # which would be compiled for minutes
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_allow_untested_optimizer": True,
    }


def fsdp_arguments(engine: str) -> dict:
    if not engine.startswith("fsdp2"):
        return {}
    config = {
        "version": 2,
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "state_dict_type": "SHARDED_STATE_DICT" if "sharded" in engine else "FULL_STATE_DICT",
        "cpu_ram_efficient_loading": engine.endswith("ram"),
    }
    return {"fsdp": "full_shard auto_wrap", "fsdp_config": config}


def make_trainer(engine: str, options: Options, world: int) -> SpftTrainer:
    settings = {
        "max_steps": options.steps,
        "per_device_train_batch_size": GLOBAL_BATCH // options.accumulation // world,
        "gradient_accumulation_steps": options.accumulation,
        "learning_rate": 1e-2,
        # well above gradient noise: a rounding error must not become a step
        "adam_epsilon": 1e-3,
        "weight_decay": 0.1,
        "lr_scheduler_type": "cosine",
        "logging_steps": 1,
        "report_to": [],
        "use_cpu": True,
        "save_strategy": "no",
        "disable_tqdm": True,
        "seed": 3,
        "bf16": options.bf16,
        "deepspeed": deepspeed_config(engine, options.bf16),
        **fsdp_arguments(engine),
    }
    arguments = TrainingArguments(options.out, **{**settings, **options.arguments})
    # after the arguments, which switch zero.Init on: ZeRO-3 loads each process its part only
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    if options.bits:
        model = quantised(Path(options.base), options.bits, dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(options.base, dtype=dtype)
    rows = [{k: v for k, v in row.items() if k != "topic"} for row in ragged_rows(96)]
    config = SpftConfig(**{"r": 4, "calibration_batches": 2, **options.config})
    return SpftTrainer(
        model, arguments, train_dataset=rows, eval_dataset=rows[:12], spft_config=config
    )


def check_engine(trainer, engine: str, world: int) -> None:
    """Launch modes silently fall back to less than was asked for: prove that this one did not."""
    accelerator = trainer.accelerator
    assert type(innermost_optimizer(trainer.optimizer)) is SelectedNeuronAdamW
    assert accelerator.num_processes == world
    assert (dist.get_world_size() if dist.is_initialized() else 1) == world
    parameters = list(trainer.model.parameters())
    if engine.startswith("zero"):
        assert accelerator.distributed_type == DistributedType.DEEPSPEED
        zero = trainer.deepspeed.optimizer
        assert trainer.deepspeed.zero_optimization_stage() == int(engine[4])
        assert all(hasattr(p, "ds_tensor") == (engine[4] == "3") for p in parameters)
        if engine.endswith("offload"):
            assert zero.cpu_offload if engine[4] != "3" else zero.offload_optimizer
            assert engine[4] != "3" or zero.offload_param
    elif engine.startswith("fsdp2"):
        assert accelerator.distributed_type == DistributedType.FSDP
        assert accelerator.is_fsdp2
        assert all(p.device_mesh.size() == world for p in parameters)
    else:
        expected = DistributedType.MULTI_CPU if world > 1 else DistributedType.NO
        assert accelerator.distributed_type == expected


class Look(TrainerCallback):
    """Proves the engine in the middle of the run, and counts the steps."""

    def __init__(self, trainer, engine: str, world: int) -> None:
        self.trainer, self.engine, self.world = trainer, engine, world
        self.steps = 0

    def on_step_end(self, *args, **kwargs):
        self.steps += 1
        check_engine(self.trainer, self.engine, self.world)


def scores_of(out: Path) -> dict[str, torch.Tensor]:
    return ImportanceScores.load(out / IMPORTANCE_FILE).scores


def main(folder: Path, engine: str, options: Options) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    start(engine)
    trainer = make_trainer(engine, options, world)
    look = Look(trainer, engine, world)
    trainer.add_callback(look)
    if options.die and rank == options.die_rank:
        arrange_death(trainer, options.die)
    resume = last_complete(options.out) if options.resume == "auto" else options.resume
    trainer.train(resume_from_checkpoint=resume)
    trainer.save_model()
    assert look.steps
    torch.save(
        {
            "index": {name: delta.index for name, delta in deltas(bare_model(trainer)).items()},
            "losses": [e["loss"] for e in trainer.state.log_history if "loss" in e],
            "steps": look.steps,
            "checkpointed": any(
                getattr(module, "gradient_checkpointing", False) is True
                for module in trainer.model.modules()
            ),
        },
        folder / f"rank{rank}.pt",
    )
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Options(**json.loads(sys.argv[3])))

"""One process of TRL runs under an engine: saves the neurons, the logged losses, and for DPO what
each step was trained on, with the deltas of that moment.

    trl_worker.py FOLDER ENGINE

FOLDER holds the preference pairs, as `PAIRS`; ENGINE is one of run_worker.py's. The runs: SFT; DPO
with neurons selected by calibrating ("fresh"), the same with the reference's log-probabilities
precomputed, deltas that are not zero at the start ("filled"), and a trained adapter of which TRL
makes its "ref" copy ("continued").
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from adapters import fill_deltas, trained
from datasets import load_from_disk
from engine_worker import SHARDED, start
from processes import hand_over
from run_worker import check_engine, deepspeed_config, fsdp_arguments
from tiny_models import tiny_model
from transformers import TrainerCallback
from trl import DPOConfig, SFTConfig
from trl_runs import arguments, completions, losses, tokenizer

from trainer_ext import SpftConfig, SpftDPOTrainer, SpftSFTTrainer, select_neurons
from trainer_ext.distributed.engine import bare_model
from trainer_ext.distributed.shards import ShardLayout, read_neurons
from trainer_ext.tuner.model import deltas, spft_layers

PAIRS = "pairs"
DPO_RUNS = ("fresh", "precomputed", "filled", "continued")
NOTED = ("input_ids", "attention_mask", "completion_mask")
GLOBAL_BATCH = 8
R = 4


class Noting:
    """Keeps the micro-batches that it trains on."""

    seen = ()

    def training_step(self, model, inputs, *args, **kwargs):
        self.seen[-1].append({k: v.clone() for k, v in inputs.items() if k in NOTED})
        return super().training_step(model, inputs, *args, **kwargs)


class NotingDPO(Noting, SpftDPOTrainer):
    pass


class NotingSFT(Noting, SpftSFTTrainer):
    pass


class Look(TrainerCallback):
    """Proves the engine in the middle of the run; keeps the deltas before each step."""

    def __init__(self, trainer, engine: str, world: int) -> None:
        self.trainer, self.engine, self.world = trainer, engine, world
        self.deltas: list[dict[str, torch.Tensor]] = []

    def on_step_begin(self, *args, **kwargs):
        check_engine(self.trainer, self.engine, self.world)
        model = bare_model(self.trainer)
        written = {layer.written is not None for layer in spft_layers(model).values()}
        assert written == {self.engine not in SHARDED}
        self.deltas.append(whole_deltas(model))
        self.trainer.seen = [*self.trainer.seen, []]


def whole_deltas(model) -> dict[str, torch.Tensor]:
    return {
        name: read_neurons(delta.weight, ShardLayout.of(delta.weight), torch.arange(R)).clone()
        for name, delta in deltas(model).items()
    }


def make(folder: Path, engine: str, kind: str, world: int):
    # before the arguments, which would switch zero.Init on
    model = trained(r=R) if kind == "continued" else tiny_model()
    settings = {
        "output_dir": folder / kind,
        "per_device_train_batch_size": GLOBAL_BATCH // 2 // world,
        "adam_epsilon": 1e-3,  # well above gradient noise: a rounding error must not become a step
        "seed": 3,
        "deepspeed": deepspeed_config(engine, bf16=False),
        **fsdp_arguments(engine),
    }
    importance = "random" if kind == "filled" else "group_taylor"
    config = SpftConfig(r=R, importance=importance, calibration_batches=2)
    more = {
        "processing_class": tokenizer,
        "spft_config": None if kind == "continued" else config,
    }
    if kind == "sft":
        return NotingSFT(
            model, arguments(SFTConfig, **settings), train_dataset=completions(), **more
        )
    precompute = kind == "precomputed"
    run = NotingDPO(
        model,
        args=arguments(DPOConfig, precompute_ref_log_probs=precompute, **settings),
        train_dataset=load_from_disk(folder / PAIRS),  # the processes share its cache
        **more,
    )
    if kind == "filled":
        select_neurons(run.model)
        fill_deltas(run.model)
    return run


def train(folder: Path, engine: str, kind: str, world: int) -> dict:
    run = make(folder, engine, kind, world)
    look = Look(run, engine, world)
    run.add_callback(look)
    run.train()
    assert getattr(run, "ref_model", None) is None
    result = {
        "losses": losses(run),
        "batches": run.seen,
        "deltas": look.deltas,
        "index": {name: delta.index for name, delta in deltas(bare_model(run)).items()},
    }
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    del run, look
    gc.collect()
    return result


def main(folder: Path, engine: str) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    start(engine)
    hand_over({kind: train(folder, engine, kind, world) for kind in ("sft", *DPO_RUNS)}, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])

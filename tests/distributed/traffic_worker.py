"""One process of runs under all engines: trains a tiny model by several methods and metrics, and
saves the collectives of one calibration and of one steady step of each case.

    traffic_worker.py FOLDER
"""

from __future__ import annotations

import gc
import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from engine_worker import check_engine, deepspeed_config, fsdp_arguments, start
from peft import LoraConfig, get_peft_model
from processes import hand_over
from scaling_model import TINY, Model, Run
from tiny_models import dataset
from traffic import Traffic
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainingArguments

from trainer_ext import SpftConfig, SpftTrainer
from trainer_ext.distributed.engine import bare_model

SIZES = {
    "tiny": TINY,
    # the same inputs, hence the same compact rows, in a base twice as large
    "wide": replace(TINY, kv_heads=4, vocab=1040),
}
BATCHES = 2  # of a calibration
DIRECTIONS = 2
# DDP arranges its buckets anew after the first step, and DeepSpeed records in the first three which
# weights it will gather: the fifth is the steady state.
STEADY_STEP = 5


@dataclass(frozen=True)
class Case:
    """A run whose traffic is counted.

    Attributes:
        method: "spft", "lora" or "full".
    """

    engine: str
    metric: str = "group_taylor"
    accumulation: int = 1
    checkpointing: bool = False
    method: str = "spft"
    size: str = "tiny"

    def __str__(self) -> str:
        words = [self.engine, self.method, self.metric if self.method == "spft" else ""]
        words += [f"x{self.accumulation}" if self.accumulation > 1 else ""]
        words += ["checkpointing" if self.checkpointing else ""]
        words += [self.size if self.size != "tiny" else ""]
        return "-".join(filter(None, words))

    @property
    def model(self) -> Model:
        size = SIZES[self.size]
        return Model(size, size.r)

    def run(self, world: int) -> Run:
        """Everything is fp32."""
        stage = self.engine.split("_")[0]
        reuse = self.engine == "zero3"  # a tiny model is within DeepSpeed's limits
        return Run(stage, world, self.accumulation, self.checkpointing, 4, 4, reuse)


# Engines that `start` prepares alike; FSDP2 last, since on a CPU it changes what accelerate sees.
FAMILIES = {
    "ddp": [
        Case("ddp"),
        Case("ddp", size="wide"),
        Case("ddp", "taylor", accumulation=2),
        Case("ddp", "zo_taylor"),
        Case("ddp", "wanda", checkpointing=True),
        Case("ddp", "magnitude"),
        Case("ddp", method="lora"),
        Case("ddp", method="full"),
    ],
    "deepspeed": [
        Case("zero1", accumulation=2),
        Case("zero2", accumulation=2),
        Case("zero3_streamed"),
        Case("zero3_streamed", "taylor", accumulation=2),
        Case("zero3_streamed", accumulation=2, checkpointing=True),
        Case("zero3_streamed", "wanda"),
        Case("zero3"),
    ],
    "fsdp2": [
        Case("fsdp2"),
        Case("fsdp2", "taylor", accumulation=2),
        Case("fsdp2", checkpointing=True),
        Case("fsdp2", "wanda"),
    ],
}


class Marks(TrainerCallback):
    """Where in the list of calls training begins and each step begins; what is held at the end."""

    def __init__(self, traffic: Traffic, trainer: Trainer) -> None:
        self.traffic, self.trainer = traffic, trainer
        self.held: dict[str, int] = {}
        self.training = 0
        self.steps: list[int] = []

    def on_train_begin(self, args, state, control, **kwargs):
        self.training = len(self.traffic.calls)

    def on_step_begin(self, args, state, control, **kwargs):
        self.steps.append(len(self.traffic.calls))

    def on_train_end(self, args, state, control, **kwargs):
        self.held = held_bytes(self.trainer)


def held_bytes(trainer: Trainer) -> dict[str, int]:
    """Bytes of this process by the names of `scaling_memory.memory`, while write-through lasts."""
    model = bare_model(trainer)
    found = {"base": 0, "values": 0, "kept": 0}
    for name, parameter in model.named_parameters():
        local = getattr(parameter, "ds_tensor", parameter)  # ZeRO-3's part
        local = local.to_local() if hasattr(local, "to_local") else local
        found["values" if "spft_delta" in name else "base"] += local.nbytes
    for layer in model.modules():
        if getattr(layer, "written", None) is not None:
            found["kept"] += layer.written.rows.nbytes
    found["moments"] = optimizer_state_bytes(trainer.optimizer, ("exp_avg", "exp_avg_sq"))
    engine = getattr(trainer.optimizer, "optimizer", None)
    copies = getattr(engine, "single_partition_of_fp32_groups", [])  # ZeRO-1, 2
    copies = getattr(engine, "fp32_partitioned_groups_flat", copies)  # ZeRO-3
    found["master"] = sum(copy.nbytes for copy in copies)
    return found


def optimizer_state_bytes(optimizer, names: tuple[str, ...]) -> int:
    """Bytes of the named state tensors that this process holds."""
    states = getattr(optimizer, "optimizer", optimizer).state.values()
    held = [state[name] for state in states for name in names]
    return sum((t.to_local() if hasattr(t, "to_local") else t).nbytes for t in held)


def count(folder: Path, case: Case, world: int) -> dict:
    """The calls before training, of the calibration, and from one steady step to the next; the
    number of modules; and what memory is held."""
    config = deepspeed_config(case.engine)
    if config:
        config["gradient_clipping"] = 1.0
    model = make_model(case)
    arguments = TrainingArguments(
        str(folder / str(case)),
        max_steps=STEADY_STEP + 1,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=case.accumulation,
        gradient_checkpointing=case.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": True},
        max_grad_norm=1.0,
        logging_steps=1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
        deepspeed=config,
        **fsdp_arguments(case.engine),
    )
    rows = dataset(rows=4 * 2 * world * case.accumulation)
    if case.method == "spft":
        spft = SpftConfig(
            r=case.model.r,
            importance=case.metric,
            calibration_batches=BATCHES,
            zo_directions=DIRECTIONS,
        )
        trainer = SpftTrainer(model, arguments, train_dataset=rows, spft_config=spft)
    else:
        trainer = Trainer(model, arguments, train_dataset=rows)
    traffic = Traffic()
    marks = Marks(traffic, trainer)
    trainer.callback_handler.callbacks.insert(0, marks)  # before the calibration
    with traffic:
        trainer.train()
    if case.method == "spft":
        check_engine(trainer, case.engine, world)
    found = {"modules": sum(1 for _ in trainer.model.modules()), "held": marks.held}
    spans = {
        "start": (0, marks.training),
        "calibration": (marks.training, marks.steps[0]),
        "step": tuple(marks.steps[STEADY_STEP - 1 : STEADY_STEP + 1]),
    }
    found |= {name: [asdict(c) for c in traffic.calls[a:b]] for name, (a, b) in spans.items()}
    AcceleratorState._reset_state(reset_partial_state=False)
    GradientState._reset_state()
    del trainer, model, marks, arguments
    gc.collect()
    return found


def make_model(case: Case) -> torch.nn.Module:
    size = SIZES[case.size]
    config = LlamaConfig(
        vocab_size=size.vocab,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads,
        tie_word_embeddings=size.tied,
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    if case.method != "lora":
        return model
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    return get_peft_model(model, LoraConfig(r=case.model.lora_rank, target_modules=targets))


def main(folder: Path) -> None:
    world = int(os.environ["WORLD_SIZE"])
    results, environment = {}, dict(os.environ)
    for cases in FAMILIES.values():
        # engines leave variables behind that choose an engine
        os.environ.clear()
        os.environ.update(environment)
        PartialState._reset_state()
        start(cases[0].engine)
        results |= {str(case): count(folder, case, world) for case in cases}
    hand_over(results, folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

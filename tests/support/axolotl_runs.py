"""Runs Axolotl's commands in this process on a tiny model, and shows what happened inside.

Axolotl is not imported before the first run, so that tests of trainer_ext alone do not pay for it.
"""

from __future__ import annotations

import copy
import importlib.metadata
import json
import os
import signal
import sys
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
import yaml
from axolotl_once import import_once
from packaging.version import Version
from quantised import save_base
from safetensors.torch import load_file
from tiny_models import byte_tokenizer, tiny_model
from transformers import AutoModelForCausalLM

WORDS = ("alpha", "beta", "gamma", "delta", "epsilon")


@dataclass(frozen=True)
class Assets:
    """A tiny model with its tokenizer, in fp32 and in bf16, and chat rows of differing length.

    The wide model's layers are those that 4 bits can hold; it is in bf16. The preference pairs have
    a prompt, a chosen and a rejected answer; the judged answers a prompt, a completion and a label.
    """

    model: Path
    model_bf16: Path
    model_wide: Path
    train: Path
    held: Path
    text: Path
    pairs: Path
    judged: Path

    def base_model(self, folder: str | Path | None = None):
        """The base model, loaded by transformers alone."""
        return AutoModelForCausalLM.from_pretrained(folder or self.model, dtype="auto")


def make_assets(folder: Path) -> Assets:
    """Write model, tokenizer and data below `folder`."""
    assets = Assets(
        folder / "model",
        folder / "model_bf16",
        folder / "model_wide",
        folder / "train.jsonl",
        folder / "held.jsonl",
        folder / "text.jsonl",
        folder / "pairs.jsonl",
        folder / "judged.jsonl",
    )
    for path, dtype in ((assets.model, torch.float32), (assets.model_bf16, torch.bfloat16)):
        tiny_model(dtype=dtype).save_pretrained(path)
        byte_tokenizer().save_pretrained(path)
    byte_tokenizer().save_pretrained(save_base(assets.model_wide))
    write_rows(assets.train, map(_chat_row, range(48)))
    write_rows(assets.held, map(_chat_row, range(100, 108)))
    write_rows(assets.text, ({"text": _answer(i)} for i in range(48)))
    write_rows(assets.pairs, map(pair, range(48)))
    write_rows(assets.judged, map(_judged, range(48)))
    return assets


def write_rows(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def pair(i: int) -> dict:
    """A preference pair, whose rejected answer is another row's chosen one."""
    return {"prompt": f"say {WORDS[i % 5]} {i}", "chosen": _answer(i), "rejected": _answer(i + 1)}


def _judged(i: int) -> dict:
    answers = pair(i)
    answer = answers["rejected" if i % 2 else "chosen"]
    return {"prompt": answers["prompt"], "completion": answer, "label": i % 2 == 0}


def _answer(i: int) -> str:
    return " ".join([WORDS[i % 5]] * (1 + i % 4))


def _chat_row(i: int) -> dict:
    messages = [
        {"role": "user", "content": f"say {WORDS[i % 5]} {i}"},
        {"role": "assistant", "content": _answer(i)},
    ]
    return {"messages": messages}


def spft_yaml(assets: Assets, **changes) -> dict:
    """A small SPFT configuration; a change to None removes the key."""
    config = {
        "base_model": str(assets.model),
        "plugins": ["axolotl_spft.SPFTPlugin"],
        "adapter": "prune_spft",
        "spft_r": 4,
        "spft_calibration_batches": 2,
        "datasets": [{"path": str(assets.train), "type": "chat_template"}],
        "dataset_prepared_path": str(assets.model.parent / "prepared"),
        "sequence_len": 96,
        "micro_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "max_steps": 2,
        "learning_rate": 0.01,
        "optimizer": "adamw_torch",
        "lr_scheduler": "constant",
        "bf16": False,
        "fp16": False,
        "tf32": False,
        "attn_implementation": "sdpa",
        "logging_steps": 1,
        "save_strategy": "no",
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "seed": 42,
        **changes,
    }
    return {key: value for key, value in config.items() if value is not None}


def quantised_yaml(assets: Assets, bits: int, **changes) -> dict:
    """`spft_yaml` on a base in 4 or 8 bits."""
    keys = {"base_model": str(assets.model_wide), f"load_in_{bits}bit": True, "bf16": True}
    return spft_yaml(assets, **{**keys, **changes})


def preference_yaml(assets: Assets, rl: str, **changes) -> dict:
    """`spft_yaml` for preference training."""
    rows = assets.judged if rl == "kto" else assets.pairs
    keys = {"datasets": [{"path": str(rows), "split": "train"}], "rl": rl}
    if rl == "kto":
        keys["remove_unused_columns"] = False  # Axolotl demands it
    if rl == "simpo":
        keys["simpo_gamma"] = 0.5
    return spft_yaml(assets, **{**keys, **changes})


def lora_yaml(assets: Assets, **changes) -> dict:
    """A LoRA configuration that knows nothing of SPFT.

    The kernels are off because they need a GPU; Axolotl turns them on by itself.
    """
    config = {
        "plugins": None,
        "adapter": "lora",
        "spft_r": None,
        "spft_calibration_batches": None,
        "lora_r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.05,
        "lora_target_linear": True,
        "lora_mlp_kernel": False,
        "lora_qkv_kernel": False,
        "lora_o_kernel": False,
        "lora_embedding_kernel": False,
        **changes,
    }
    return spft_yaml(assets, **config)


def with_evaluation(assets: Assets, **changes) -> dict:
    """Keys that add the held-out rows as the evaluation set."""
    held = {"path": str(assets.held), "ds_type": "json", "type": "chat_template", "split": "train"}
    return {"test_datasets": [held], **changes}


@dataclass
class Run:
    """A training run that has ended.

    Attributes:
        out: its output_dir.
        trainer: Axolotl's trainer.
        batches: every micro batch that was trained on, in order.
        step_losses: loss of each of them.
        calibration: every micro batch that the loss was computed on outside training.
    """

    out: Path
    trainer: object = None
    batches: list[dict[str, torch.Tensor]] = field(default_factory=list)
    step_losses: list[float] = field(default_factory=list)
    calibration: list[dict[str, torch.Tensor]] = field(default_factory=list)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        return adapter_tensors(self.out)

    @property
    def losses(self) -> list[float]:
        return [entry["loss"] for entry in self.trainer.state.log_history if "loss" in entry]

    @property
    def eval_losses(self) -> list[float]:
        history = self.trainer.state.log_history
        return [entry["eval_loss"] for entry in history if "eval_loss" in entry]

    def watch(self, trainer) -> None:
        """Record what the trainer computes its loss on."""
        self.trainer = trainer
        compute_loss, training_step = trainer.compute_loss, trainer.training_step
        in_step = []

        def recording_step(*args, **kwargs):
            in_step.append(True)
            try:
                return training_step(*args, **kwargs)
            finally:
                in_step.pop()

        def recording_loss(model, inputs, *args, **kwargs):
            batch = copy.deepcopy(dict(inputs))
            loss = compute_loss(model, inputs, *args, **kwargs)
            if in_step:
                self.batches.append(batch)
                self.step_losses.append(float(loss.detach()))
            else:
                self.calibration.append(batch)
            return loss

        trainer.compute_loss, trainer.training_step = recording_loss, recording_step


def train(config: dict, out: Path, on_trainer=None) -> Run:
    """`axolotl train` of a configuration into `out`.

    Args:
        on_trainer: called with the trainer when it has been built.
    """
    from axolotl.cli.train import do_cli
    from axolotl.integrations.base import PluginManager

    run = Run(Path(out))
    post_trainer_create = PluginManager.post_trainer_create

    def and_watch(self, cfg, trainer):
        post_trainer_create(self, cfg, trainer)
        run.watch(trainer)
        if on_trainer is not None:
            on_trainer(trainer)

    with mock.patch.object(PluginManager, "post_trainer_create", and_watch):
        call(do_cli, config, out)
    return run


def call(do_cli, config: dict, out: Path, **kwargs):
    """Call one of Axolotl's `do_cli` functions on a configuration, as its command line does."""
    with mock.patch.object(sys, "argv", ["axolotl"]):
        return do_cli(str(write_yaml(config, out)), **kwargs)


def write_yaml(config: dict, out: Path) -> Path:
    """Write the configuration beside `out`, with `out` as its output_dir."""
    path = Path(f"{out}.yml")
    path.write_text(yaml.safe_dump({**config, "output_dir": str(out)}))
    return path


def loss_of_step(model, micro_batches: list[dict]) -> torch.Tensor:
    """What one optimizer step minimises, from plain forwards.

    Since Axolotl 0.20 every target token of the step counts alike. Earlier ones average the micro
    batches' own means, because they look for `num_items_in_batch` in the forward's signature, where
    transformers' models do not have it, and so switch its use off.
    """
    losses = torch.stack([model(**batch, use_cache=False).loss for batch in micro_batches])
    targets = torch.tensor([int((b["labels"][:, 1:] != -100).sum()) for b in micro_batches])
    if len(targets) > 1:
        assert len(set(targets.tolist())) > 1, "both ways of averaging give the same here"
    if tokens_count_alike():
        return (losses * targets).sum() / targets.sum()
    return losses.mean()


def tokens_count_alike() -> bool:
    """Whether Axolotl averages a step's loss over all its tokens; see `loss_of_step`."""
    return Version(importlib.metadata.version("axolotl")) >= Version("0.20")


def adapter_tensors(folder: str | Path) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "adapter_model.safetensors")


def layers_of(tensors: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """An adapter file's tensors by layer name in the base model, and there by kind."""
    layers: dict[str, dict[str, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, kind = key.removeprefix("base_model.model.").partition(".spft_delta.")
        if kind:
            layers.setdefault(name, {})[kind] = tensor
    return layers


def with_delta(assets: Assets, folder: Path, base: Path | None = None) -> dict[str, torch.Tensor]:
    """The base file's tensors with the adapter's rows in them, computed from the files alone."""
    weights = load_file((base or assets.model) / "model.safetensors")
    for name, layer in layers_of(adapter_tensors(folder)).items():
        weight = weights[f"{name}.weight"]
        rows = layer.get("anchor", weight[layer["index"]]).float() + layer["weight"]
        weight[layer["index"]] = rows.to(weight.dtype)
    return weights


def same_tensors(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    """Whether two files hold the same bits under the same names."""
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a
    )


def same_batches(a: list[dict], b: list[dict]) -> bool:
    """Whether two recordings hold the same bits in the same order."""
    tensors = [[_tensors(batch) for batch in batches] for batches in (a, b)]
    return len(a) == len(b) and all(map(same_tensors, *tensors))


def _tensors(batch: dict) -> dict[str, torch.Tensor]:
    """A preference batch also holds its texts."""
    return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}


@contextmanager
def own_process_state():
    """Undo what a run leaves in the process: plugins, environment, hooks, engine state.

    Axolotl keeps its plugins in a singleton and talks to accelerate by environment variables.
    """
    environment, hook = dict(os.environ), sys.excepthook
    handler, path = signal.getsignal(signal.SIGINT), list(sys.path)
    os.environ["AXOLOTL_TEE_STDOUT"] = "0"  # no copy of the output into the first output_dir
    import_once()
    from accelerate.state import AcceleratorState, GradientState
    from axolotl.integrations.base import PluginManager

    try:
        yield
    finally:
        manager = PluginManager.get_instance()
        manager.plugins.clear()
        manager.cfg = None
        AcceleratorState._reset_state()
        GradientState._reset_state()
        signal.signal(signal.SIGINT, handler)
        sys.excepthook = hook
        sys.path[:] = path
        os.environ.clear()
        os.environ.update(environment)

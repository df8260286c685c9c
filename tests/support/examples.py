"""The YAMLs of example_configs/, and what they are at tiny size."""

from __future__ import annotations

import json
from pathlib import Path

import yaml
from axolotl_runs import Assets

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "example_configs"
PATHS = sorted(FOLDER.glob("*.yml"))
SEVERAL_PROCESSES = ("multi-node.yml",)  # and those that name an engine


def read(path: Path) -> dict:
    return yaml.safe_load(path.read_text())


def engine_of(path: Path) -> str | None:
    """The engine, as tests/distributed/run_worker.py calls it; None for one process."""
    example = read(path)
    if "deepspeed" in example:
        zero = json.loads((ROOT / example["deepspeed"]).read_text())["zero_optimization"]
        return f"zero{zero['stage']}" + ("_offload" if "offload_optimizer" in zero else "")
    if "fsdp_config" in example:
        assert example["fsdp_version"] == 2
        return "fsdp2"
    return "ddp" if path.name in SEVERAL_PROCESSES else None


def tiny(example: dict, assets: Assets) -> dict:
    """The example on the tiny model, with two steps on two cores; everything else is its own."""
    # bf16 on a CPU is what our plugin lets Axolotl do
    bf16 = bool(example.get("bf16")) and example["adapter"] != "lora"
    rows = assets.pairs if "rl" in example else assets.train
    config = {
        **example,
        "base_model": str(_model(example, assets, bf16)),
        "datasets": [_here(source, rows) for source in example["datasets"]],
        # one for all
        "dataset_prepared_path": str(assets.model.parent / "prepared"),
        "sequence_len": 96,
        "micro_batch_size": 1,
        "max_steps": 2,
        "warmup_steps": 1,
        "dataset_num_proc": 1,
        "dataloader_num_workers": 0,
        "save_strategy": "no",
        "tf32": False,
        "attn_implementation": "sdpa",
        "bf16": bf16,  # "auto" finds no GPU here
    }
    if not bf16:
        config["fp16"] = False
    if example.get("test_datasets"):
        config["test_datasets"] = [_here(s, assets.held) for s in example["test_datasets"]]
    if example.get("val_set_size", 0) >= 1:
        config["val_set_size"] = 4
    if "lora_r" in example:
        config["lora_r"] = 4
    elif "spft_density" not in example and "lora_model_dir" not in example:
        config["spft_r"] = 4
    if example["adapter"] == "lora":  # its kernels, which Axolotl turns on, need a GPU
        config |= {f"lora_{part}_kernel": False for part in ("mlp", "qkv", "o", "embedding")}
    dropped = ("save_steps", "num_epochs")
    return {k: v for k, v in config.items() if k not in dropped}


def _model(example: dict, assets: Assets, bf16: bool) -> Path:
    if example.get("load_in_4bit"):
        return assets.model_wide
    return assets.model_bf16 if bf16 else assets.model


def _here(source: dict, path: Path) -> dict:
    return {**source, "path": str(path), "ds_type": "json", "split": "train"}

"""`axolotl train` of one YAML under DDP, ZeRO-2 (optimizer offloaded), ZeRO-3 and FSDP2 in two real
processes ends as in one process on the same global batches: losses to 1e-5, adapters to 1e-4 of
their norm; checkpoints are complete, and `auto_resume_from_checkpoints` goes on from the last
complete one to the same bits. The workers assert engine, stage and world size."""

from __future__ import annotations

import json

import pytest
import torch
from axolotl_runs import adapter_tensors, layers_of, same_tensors, spft_yaml, write_yaml
from forked import launch

from trainer_ext.checkpoints import what_is_missing

# What Axolotl ships as zero2.json and zero3.json says in these keys.
ZERO2 = {"stage": 2, "offload_optimizer": {"device": "cpu"}, "contiguous_gradients": True}
ZERO3 = {
    "stage": 3,
    "contiguous_gradients": True,
    "sub_group_size": 0,
    "stage3_param_persistence_threshold": "auto",
    "max_live_parameters": 0,
    "max_reuse_distance": 0,
    "gather_16bit_weights_on_model_save": True,
}
FSDP2 = {
    "fsdp_version": 2,
    "fsdp_config": {
        "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
        "transformer_layer_cls_to_wrap": "LlamaDecoderLayer",
        "state_dict_type": "SHARDED_STATE_DICT",
        "reshard_after_forward": True,
        "cpu_ram_efficient_loading": True,
    },
}


def deepspeed_json(folder, zero: dict) -> dict:
    path = folder / "deepspeed.json"
    sizes = dict.fromkeys(
        ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"),
        "auto",
    )
    clipping = {"gradient_clipping": "auto", "bf16": {"enabled": "auto"}}
    path.write_text(json.dumps({"zero_optimization": zero, **sizes, **clipping}))
    return {"deepspeed": str(path)}


ENGINES = {
    "ddp": lambda folder: {},
    "zero2_offload": lambda folder: deepspeed_json(folder, ZERO2),
    "zero3_default": lambda folder: (
        deepspeed_json(folder, ZERO3) | {"gradient_checkpointing": True}
    ),
    "fsdp2_ram": lambda folder: FSDP2,
}


def configuration(assets, **changes) -> dict:
    on_cpu = {"max_memory": {"cpu": "20GiB"}, "experimental_skip_move_to_device": True}
    run = {"max_steps": 4, "micro_batch_size": 2, "adam_epsilon": 1e-3, "save_steps": 2}
    return spft_yaml(assets, save_strategy="steps", **run, **on_cpu, **changes)


def train(engine: str, world: int, config: dict, out, attempt: str = "") -> list[dict]:
    yaml = write_yaml(config, out)
    folder = out.with_name(f"{out.name}.ranks{attempt}")
    return launch("axolotl_worker.py", folder, world, engine, str(yaml))


@pytest.fixture(scope="module")
def one(assets, tmp_path_factory):
    out = tmp_path_factory.mktemp("one") / "out"
    ranks = train("none", 1, configuration(assets, gradient_accumulation_steps=2), out)
    return ranks[0]["losses"], adapter_tensors(out)


@pytest.mark.parametrize("engine", ENGINES)
def test_the_run_is_that_of_one_process_and_resumes(assets, one, tmp_path, engine):
    config = configuration(assets, **ENGINES[engine](tmp_path))
    out = tmp_path / "out"
    for rank in train(engine, 2, config, out):
        assert rank["losses"] == pytest.approx(one[0], rel=1e-5)
        assert rank["steps"] == 4
    final = adapter_tensors(out)
    for name, layer in layers_of(one[1]).items():
        here = layers_of(final)[name]
        assert torch.equal(here["index"], layer["index"])
        difference = (here["weight"] - layer["weight"]).norm() / layer["weight"].norm()
        assert difference <= 1e-4, name
    assert what_is_missing(out / "checkpoint-4") is None

    # a run that ended while it wrote checkpoint-4: Axolotl's own search would take that
    mark = out / "checkpoint-4" / "spft_checkpoint.json"
    mark.write_text(json.dumps({**json.loads(mark.read_text()), "complete": False}))
    config["auto_resume_from_checkpoints"] = True
    for rank in train(engine, 2, config, out, "again"):
        assert rank["steps"] == 2
    assert same_tensors(adapter_tensors(out), final)

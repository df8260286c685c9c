"""`axolotl train` of one YAML under DDP, ZeRO-2 (optimizer offloaded), ZeRO-3 and FSDP2 in two real
processes ends as in one process on the same global batches: losses to 1e-5, adapters to 1e-4 of
their norm, for SFT and for `rl`; checkpoints are complete, and `auto_resume_from_checkpoints` goes
on from the last complete one to the same bits. The workers assert engine, stage and world size."""

from __future__ import annotations

import json
from functools import cache

import pytest
import torch
from axolotl_runs import (
    adapter_tensors,
    layers_of,
    preference_yaml,
    quantised_yaml,
    same_tensors,
    spft_yaml,
    write_yaml,
)
from forked import launch

from trainer_ext.checkpoints.folders import what_is_missing

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


RUN = {
    "max_steps": 4,
    "micro_batch_size": 2,
    "adam_epsilon": 1e-3,
    "save_strategy": "steps",
    "save_steps": 2,
    # on a CPU
    "max_memory": {"cpu": "20GiB"},
    "experimental_skip_move_to_device": True,
}


def configuration(assets, **changes) -> dict:
    return spft_yaml(assets, **RUN, **changes)


def train(engine: str, world: int, config: dict, out, attempt: str = "") -> list[dict]:
    yaml = write_yaml(config, out)
    folder = out.with_name(f"{out.name}.ranks{attempt}")
    return launch("axolotl_worker.py", folder, world, engine, str(yaml))


def check_same_adapter(a: dict, b: dict, tolerance: float = 1e-4) -> None:
    for name, layer in layers_of(b).items():
        here = layers_of(a)[name]
        assert torch.equal(here["index"], layer["index"])
        difference = (here["weight"] - layer["weight"]).norm() / layer["weight"].norm()
        assert difference <= tolerance, name


def indices(tensors: dict) -> dict:
    return {name: tensor for name, tensor in tensors.items() if name.endswith(".index")}


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
    check_same_adapter(final, one[1])
    assert what_is_missing(out / "checkpoint-4") is None

    # a run that ended while it wrote checkpoint-4: Axolotl's own search would take that
    mark = out / "checkpoint-4" / "spft_checkpoint.json"
    mark.write_text(json.dumps({**json.loads(mark.read_text()), "complete": False}))
    config["auto_resume_from_checkpoints"] = True
    for rank in train(engine, 2, config, out, "again"):
        assert rank["steps"] == 2
    assert same_tensors(adapter_tensors(out), final)


@pytest.fixture(scope="module")
def one_with(assets, tmp_path_factory):
    """The run of one process with a method of preference training."""

    @cache
    def run(rl: str):
        out = tmp_path_factory.mktemp(rl) / "out"
        config = preference_yaml(assets, rl, **RUN, gradient_accumulation_steps=2)
        return train("none", 1, config, out)[0]["losses"], adapter_tensors(out)

    return run


PREFERENCES = [("dpo", engine) for engine in ENGINES]
PREFERENCES += [(rl, "ddp") for rl in ("ipo", "kto", "orpo", "simpo")]


@pytest.mark.parametrize(
    ("rl", "engine"),
    [PREFERENCES[0], *(pytest.param(*case, marks=pytest.mark.full) for case in PREFERENCES[1:])],
)
def test_preference_training_is_that_of_one_process(assets, one_with, tmp_path, rl, engine):
    out = tmp_path / "out"
    config = preference_yaml(assets, rl, **RUN, **ENGINES[engine](tmp_path))
    losses, tensors = one_with(rl)
    # KTO's estimate of the divergence is taken over what all processes hold at a time, so its loss
    # depends on their number once policy and reference differ
    same = 1 if rl == "kto" else 4
    for rank in train(engine, 2, config, out):
        assert rank["losses"][:same] == pytest.approx(losses[:same], rel=1e-5)
        assert rank["steps"] == 4
    here = adapter_tensors(out)
    if rl == "kto":
        assert same_tensors(indices(here), indices(tensors))
    else:
        check_same_adapter(here, tensors)
    assert not list(out.glob("model*")), "frozen weights were saved"


# bitsandbytes quantises what it has values of: every process loads the model
FSDP2_QUANTISED = {
    **FSDP2,
    "fsdp_config": {**FSDP2["fsdp_config"], "cpu_ram_efficient_loading": False},
}
QUANTISED = [(bits, engine) for bits in (4, 8) for engine in ENGINES]


@pytest.fixture(scope="module")
def one_over(assets, tmp_path_factory):
    """The run of one process over a base in so many bits."""

    @cache
    def run(bits: int):
        out = tmp_path_factory.mktemp(f"{bits}bit") / "out"
        config = over(assets, bits, gradient_accumulation_steps=2)
        return train("none", 1, config, out)[0]["losses"], adapter_tensors(out)

    return run


def over(assets, bits: int, **changes) -> dict:
    """4 bits compute in fp32; Axolotl has 8 bits in 16-bit alone."""
    return quantised_yaml(assets, bits, **RUN, **changes, **({"bf16": False} if bits == 4 else {}))


@pytest.mark.parametrize(
    ("bits", "engine"),
    [QUANTISED[0], *(pytest.param(*case, marks=pytest.mark.full) for case in QUANTISED[1:])],
)
def test_training_over_a_quantised_base_is_that_of_one_process(
    assets, one_over, tmp_path, bits, engine
):
    out = tmp_path / "out"
    keys = FSDP2_QUANTISED if engine == "fsdp2_ram" else ENGINES[engine](tmp_path)
    losses, tensors = one_over(bits)
    # these engines' bf16 rounds deltas or outputs too, to 2^-9, and Adam's first steps multiply it
    in_bf16 = bits == 8 and engine != "ddp"
    for rank in train(engine, 2, over(assets, bits, **keys), out):
        assert rank["losses"] == pytest.approx(losses, rel=1e-2 if in_bf16 else 1e-5)
        assert rank["steps"] == 4
    check_same_adapter(adapter_tensors(out), tensors, 0.1 if in_bf16 else 1e-4)

"""The YAMLs for several processes, each in two real ones that are started as torchrun starts them.

Invariants: the engine's keys are the file's own; the engine and stage that it names is what trains
(the worker asserts it in every step), every layer moves, and the checkpoint is complete and says
which engine made it.
"""

from __future__ import annotations

import pytest
from axolotl_runs import adapter_tensors, layers_of, write_yaml
from examples import PATHS, engine_of, read, tiny
from forked import launch

from trainer_ext.checkpoints.folders import CheckpointMark, what_is_missing

# Axolotl asks an accelerator for its memory, and moves the model to it
ON_CPU = {"max_memory": {"cpu": "20GiB"}, "experimental_skip_move_to_device": True}
SEVERAL = [path for path in PATHS if engine_of(path) is not None]
NAMES = {
    "ddp": "DDP",
    "zero2": "ZeRO-2",
    "zero3": "ZeRO-3",
    "zero3_offload": "ZeRO-3",
    "fsdp2": "FSDP2",
}


def test_every_engine_has_an_example():
    assert {engine_of(path) for path in SEVERAL} == set(NAMES)


@pytest.mark.parametrize("path", SEVERAL, ids=lambda path: path.name)
def test_example_trains_in_two_processes(assets, tmp_path, path):
    engine = engine_of(path)
    config = {**tiny(read(path), assets), **ON_CPU, "save_strategy": "steps", "save_steps": 2}
    config |= {"spft_calibration_batches": 2}
    yaml = write_yaml(config, tmp_path / "out")
    for rank in launch("axolotl_worker.py", tmp_path / "said", 2, engine, str(yaml)):
        assert rank["steps"] == 2

    checkpoint = tmp_path / "out" / "checkpoint-2"
    assert what_is_missing(checkpoint) is None
    mark = CheckpointMark.read(checkpoint)
    assert (mark.engine, mark.world_size) == (NAMES[engine], 2)
    for folder in (checkpoint, tmp_path / "out"):
        layers = layers_of(adapter_tensors(folder))
        assert layers
        for name, layer in layers.items():
            assert layer["weight"].any(), f"{name} has not moved"
            assert layer["selected"].all()

"""example_configs/accelerate: accelerate reads each file without complaint, asks torchrun for the
nodes and processes that it names, and leads a script that names no engine to the file's engine."""

from __future__ import annotations

import json
import os
from unittest import mock

import pytest
import torch.distributed.run
from accelerate.commands import launch as accelerate_launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType
from examples import FOLDER, ROOT
from forked import launch
from tiny_models import tiny_model

# file -> type, nodes, processes of all nodes
CONFIGS = {
    "ddp": (DistributedType.MULTI_GPU, 1, 8),
    "deepspeed": (DistributedType.DEEPSPEED, 1, 8),
    "fsdp2": (DistributedType.FSDP, 1, 8),
    "multi-node-4x8": (DistributedType.MULTI_GPU, 4, 32),
    "multi-node-64x8": (DistributedType.MULTI_GPU, 64, 512),
}
ENGINES = {"deepspeed": "zero3", "fsdp2": "fsdp2"}


def path(name: str) -> str:
    return str(FOLDER / "accelerate" / f"{name}.yaml")


def launched(monkeypatch, name: str, *options: str) -> tuple:
    """What `accelerate launch` hands to torchrun: its arguments and environment."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(accelerate_launch, "is_port_in_use", lambda port: False, raising=False)
    seen = []
    run = mock.patch.object(
        torch.distributed.run, "run", lambda args: seen.append((args, dict(os.environ)))
    )
    parser = accelerate_launch.launch_command_parser()
    command = ["--config_file", path(name), *options, "-m", "axolotl.cli.train", "config.yml"]
    with run:
        accelerate_launch.launch_command(parser.parse_args(command))
    return seen[0]


def test_every_file_is_known():
    assert {p.stem for p in (FOLDER / "accelerate").iterdir()} == set(CONFIGS)


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_reads_it(name):
    config = load_config_from_file(path(name))
    kind, nodes, processes = CONFIGS[name]
    assert (config.distributed_type, config.num_machines, config.num_processes) == (
        kind,
        nodes,
        processes,
    )
    assert not config.use_cpu
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
    if name == "deepspeed":
        assert (ROOT / config.deepspeed_config["deepspeed_config_file"]).is_file()


@pytest.mark.parametrize("name", ["ddp", *ENGINES])
def test_one_node_gets_eight_processes(monkeypatch, name):
    args, _ = launched(monkeypatch, name)
    assert str(args.nproc_per_node) == "8"
    assert args.module
    assert args.training_script == "axolotl.cli.train"


@pytest.mark.parametrize("nodes", [4, 64])
def test_nodes_meet_at_node_0(monkeypatch, nodes):
    options = ("--machine_rank", "3", "--main_process_ip", "node0")
    args, _ = launched(monkeypatch, f"multi-node-{nodes}x8", *options)
    assert (args.nnodes, args.nproc_per_node, args.node_rank) == (str(nodes), "8", 3)
    assert (args.rdzv_backend, args.rdzv_endpoint) == ("static", "node0:29500")


@pytest.mark.parametrize("name", ENGINES)
def test_it_leads_a_script_to_its_engine(monkeypatch, tmp_path, name):
    _, environment = launched(monkeypatch, name)
    mine = {k: v for k, v in environment.items() if k.startswith(("ACCELERATE_", "FSDP_"))}
    tiny_model().save_pretrained(tmp_path / "base")
    options = {"base": str(tmp_path / "base"), "out": str(tmp_path / "out"), "steps": 2}
    given = json.dumps(options), json.dumps(mine)
    for rank in launch("accelerate_worker.py", tmp_path / "said", 2, ENGINES[name], *given):
        assert rank["steps"] == 2

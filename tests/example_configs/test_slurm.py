"""example_configs/slurm/spft.sbatch: bash accepts it, and with SLURM's variables and stand-ins for
its commands it prepares the data once and asks torchrun for what it should."""

from __future__ import annotations

import os
import subprocess

from examples import FOLDER
from torch.distributed.run import get_args_parser

SCRIPT = FOLDER / "slurm" / "spft.sbatch"
COMMANDS = {
    "scontrol": '[ "$*" = "show hostnames node[07-10]" ] && printf "node%s\\n" 07 08 09 10',
    "srun": 'printf "%s\\n" srun "$@"',
}


def run(folder, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    for name, body in COMMANDS.items():
        (folder / name).write_text(f"#!/bin/bash\n{body}\n")
        (folder / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_NODELIST": "node[07-10]",
        "SLURM_NNODES": "4",
        "SLURM_JOB_ID": "123456",
        "SLURM_GPUS_ON_NODE": "8",
    }
    return subprocess.run(
        ["bash", str(SCRIPT), *arguments],
        env={"PATH": f"{folder}{os.pathsep}{os.environ['PATH']}", **slurm, **variables},
        capture_output=True,
        text=True,
    )


def torchrun(done: subprocess.CompletedProcess):
    """The arguments of the second srun, as torchrun reads them."""
    assert done.returncode == 0, done.stderr
    _, prepare, train = done.stdout.split("srun\n")
    assert prepare.split() == (
        ["--nodes=1", "--ntasks=1", "--nodelist=node07", "axolotl", "preprocess", "config.yml"]
    )
    words = train.split("\n")[:-1]
    assert words[:3] == ["--kill-on-bad-exit=0", "--wait=120", "torchrun"]
    return get_args_parser().parse_args(words[3:])


def test_bash_accepts_it():
    assert subprocess.run(["bash", "-n", str(SCRIPT)]).returncode == 0


def test_every_node_starts_an_agent_that_meets_the_others_on_the_first(tmp_path):
    args = torchrun(run(tmp_path, "config.yml", "--learning-rate=0.001"))
    assert (args.nnodes, args.nproc_per_node, args.max_restarts) == ("4", "8", 0)
    assert (args.rdzv_backend, args.rdzv_endpoint) == ("c10d", "node07:23456")
    assert args.rdzv_id == "123456"
    assert args.module
    assert args.training_script == "axolotl.cli.train"
    assert args.training_script_args == ["config.yml", "--learning-rate=0.001"]


def test_restarts_and_processes_can_be_set(tmp_path):
    args = torchrun(run(tmp_path, "config.yml", MAX_RESTARTS="3", GPUS_PER_NODE="4"))
    assert (args.nproc_per_node, args.max_restarts) == ("4", 3)


def test_a_restart_gets_a_store_of_its_own():
    """Without it torchrun's restarted processes read the addresses of those that are gone."""
    assert "export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1\n" in SCRIPT.read_text()


def test_without_a_configuration_it_says_how_to_be_called(tmp_path):
    done = run(tmp_path)
    assert done.returncode != 0
    assert "usage: sbatch spft.sbatch CONFIG.yml" in done.stderr
    assert not done.stdout

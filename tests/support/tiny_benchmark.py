"""Workloads of the benchmarks at the smallest size, and whole runs of their scripts."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
import workload

import trainer_ext

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
# A script's process gets the packages of this one.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(trainer_ext.__file__).parents[1])}


def make_workload(**changes) -> workload.Workload:
    options = {"dtype": torch.float32, "seq_len": 16, "batch_size": 2, "checkpointing": False}
    options |= {"device": torch.device("cpu"), "size": workload.SIZES["tiny"], "r": 8}
    return workload.Workload(**options | changes)


def workload_named(name: str) -> workload.Workload:
    """A workload by its dtype, with `-checkpointing` behind it if wanted."""
    dtype, _, checkpointing = name.partition("-")
    return make_workload(dtype=workload.DTYPES[dtype], checkpointing=bool(checkpointing))


def run_script(script: str, folder: Path, *arguments: str) -> tuple[str, list[str]]:
    """Run a benchmark with two repeats; returns what it printed and its arguments."""
    options = {"size": "tiny", "repeats": 2, "warmup": 1, "seq-len": 16, "batch-size": 2}
    options |= {"device": "cpu", "output-dir": folder}
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    given += arguments
    command = [sys.executable, str(BENCHMARKS / script), *given]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, given

"""The command line as a user starts it: real processes, exit codes, the two output streams.

Invariants: `axolotl train` through its default launcher gives bit for bit what the same YAML gives
in this process; two processes select and train as one does on the same data; a mistake ends
`python -m axolotl.cli.train` with exit code 1 and one line.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import cpu_processes
import pytest
import torch
from axolotl_runs import adapter_tensors, layers_of, same_tensors, spft_yaml, train, write_yaml

BIN = Path(sys.executable).parent
TIMEOUT = 240


def _run(command: list[str], **environment: str) -> subprocess.CompletedProcess:
    path = f"{BIN}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        command,
        env={**os.environ, "PATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=TIMEOUT,
    )


def test_axolotl_train_equals_the_run_in_this_process(assets, tmp_path):
    config = spft_yaml(assets, max_steps=3)
    yaml = write_yaml(config, tmp_path / "out")
    done = _run([str(BIN / "axolotl"), "train", str(yaml)])
    assert done.returncode == 0, done.stderr[-3000:]
    # Axolotl's log filter hides other packages' progress messages; this one must be seen
    assert (done.stdout + done.stderr).count("SPFT selected") == 1
    assert same_tensors(adapter_tensors(tmp_path / "out"), train(config, tmp_path / "here").tensors)


def test_two_processes_train_as_one(assets, tmp_path):
    """Per step, two processes with one micro batch each see what one sees with two."""
    # Adam's epsilon far above gradient noise, or a rounding error becomes a whole step
    shared = {"max_steps": 3, "micro_batch_size": 2, "adam_epsilon": 1e-3}
    on_cpu = {"max_memory": {"cpu": "20GiB"}, "experimental_skip_move_to_device": True}
    yaml = write_yaml(spft_yaml(assets, **shared, **on_cpu), tmp_path / "two")
    launch = [str(BIN / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    done = _run(
        [*launch, cpu_processes.__file__, "axolotl.cli.train", str(yaml)], ACCELERATE_USE_CPU="true"
    )
    assert done.returncode == 0, done.stderr[-3000:]

    two = json.loads((tmp_path / "two" / "spft_report.json").read_text())
    assert two["world_size"] == 2
    config = spft_yaml(assets, **shared, gradient_accumulation_steps=2)
    one = train(config, tmp_path / "one", cpu_processes.average_micro_batches_alone)
    losses = [loss for _, loss in two["train_loss"]]
    assert losses == pytest.approx(one.losses, abs=1e-5)
    layers = layers_of(adapter_tensors(tmp_path / "two"))
    for name, layer in layers_of(one.tensors).items():
        assert torch.equal(layers[name]["index"], layer["index"])
        torch.testing.assert_close(layers[name]["weight"], layer["weight"], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"spft_r": 0}, "axolotl-spft: spft_r is 0; allowed is a whole number of at least 1"),
        ({"spft_importance_file": "nowhere"}, "axolotl-spft: spft_importance_file is 'nowhere'"),
    ],
    ids=["while reading the YAML", "when training begins"],
)
def test_a_mistake_ends_in_one_line(assets, tmp_path, changes, line):
    yaml = write_yaml(spft_yaml(assets, **changes), tmp_path / "out")
    done = _run([sys.executable, "-m", "axolotl.cli.train", str(yaml)])
    assert done.returncode == 1
    assert "Traceback" not in done.stderr + done.stdout
    last = done.stderr.rstrip("\n").splitlines()[-1]
    assert last.startswith(line)
    assert done.stderr.count("axolotl-spft:") == 1

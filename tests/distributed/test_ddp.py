"""DDP with 2 and 3 real processes on the same global batches as one process: every rank selects the
same neurons, bit for bit, and those of one process; scores agree to 1e-5 of the layer's largest,
losses and deltas to 1e-5."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent


def launch(folder: Path, world: int, worker: str = "ddp_worker.py") -> list[dict]:
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc-per-node={world}"] if world > 1 else []
    if world == 1:
        command = [sys.executable]
    environment = {
        **os.environ,
        # this checkout, wherever an editable install may point
        "PYTHONPATH": os.pathsep.join(map(str, (HERE.parents[1], HERE.parent / "support"))),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
    }
    done = subprocess.run(
        [*command, str(HERE / worker), str(folder)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = [torch.load(folder / f"rank{rank}.pt") for rank in range(world)]
    assert len(list(folder.glob("rank*.pt"))) == world
    return results


@pytest.fixture(scope="module")
def one_process(tmp_path_factory):
    return launch(tmp_path_factory.mktemp("one") / "run", 1)[0]


@pytest.mark.parametrize("world", [2, 3])
def test_ddp_is_one_process(tmp_path, world, one_process):
    ranks = launch(tmp_path / "run", world)
    for rank in ranks:
        for name, index in one_process["index"].items():
            assert torch.equal(rank["index"][name], index), name
            assert torch.equal(rank["delta"][name], ranks[0]["delta"][name]), name
            expected = one_process["delta"][name]
            error = (rank["delta"][name] - expected).norm() / expected.norm()
            assert error <= 1e-5, name
        for name, scores in one_process["scores"].items():
            assert (rank["scores"][name] - scores).abs().max() <= 1e-5 * scores.max()
    assert ranks[0]["losses"] == pytest.approx(one_process["losses"], rel=1e-5)


def test_classes_reach_the_calibration_of_every_process(tmp_path):
    """Each process gets those of its own rows, and the model below DDP never gets any."""
    ranks = launch(tmp_path / "run", 2, "class_worker.py")
    rows = set()
    for rank in ranks:
        assert len(rank["calibration"]) == len(rank["training"]) == 2
        for calibrated, (first_tokens, classes) in zip(
            rank["calibration"], rank["training"], strict=True
        ):
            assert torch.equal(calibrated, classes)
            assert torch.equal(classes, first_tokens % 3)
            rows.update(first_tokens.tolist())
        assert "input_ids" in rank["model"]
        assert not rank["model"] & {"spft_class", "kind"}
    assert len(rows) == 16

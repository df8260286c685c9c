"""Starts real processes with torchrun on this machine and collects what each of them saved; and the
end of a process, however it was started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import torch
import torch.distributed as dist

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WORKERS = HERE.parent / "distributed"


def launch(worker: str, folder: Path, world: int, *arguments: str, timeout: int = 300) -> list:
    """Run tests/distributed/<worker> in `world` processes; every one saves rank<k>.pt in `folder`.

    The worker gets `folder` and `arguments`. One process is started without torchrun.
    """
    folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable]
    if world > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world}"]
    environment = {
        **os.environ,
        # this checkout first, wherever an editable install may point
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, HERE, WORKERS, ROOT / "benchmarks"))),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        # the sandbox's host name may not resolve
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }
    done = subprocess.run(
        [*command, str(WORKERS / worker), str(folder), *arguments],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert len(list(folder.glob("rank*.pt"))) == world
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]


def hand_over(result: dict, folder: Path) -> None:
    """A worker's last act: save its result, and leave when all processes have."""
    torch.save(result, folder / f"rank{os.environ.get('RANK', '0')}.pt")
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()

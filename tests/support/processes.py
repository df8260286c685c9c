"""Starts real processes on this machine and collects what each of them saved or said."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

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
    done = subprocess.run(
        [*command, str(WORKERS / worker), str(folder), *arguments],
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
    )
    assert done.returncode == 0, done.stderr[-6000:]
    assert len(list(folder.glob("rank*.pt"))) == world
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(world)]


@dataclass(frozen=True)
class Ended:
    """How a process ended: its exit code (-9: killed by SIGKILL) and its whole stderr."""

    code: int
    stderr: str


def launch_until_end(
    worker: str, folder: Path, world: int, *arguments: str, timeout: int = 120
) -> list[Ended]:
    """As `launch`, but each process is started directly and may fail; how each of them ended.

    Without torchrun nobody ends the others when one process fails: they have to find out. All must
    have ended within `timeout` seconds.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world):
        with (folder / f"stderr{rank}.txt").open("w") as stderr:
            processes.append(
                subprocess.Popen(
                    [sys.executable, str(WORKERS / worker), str(folder), *arguments],
                    env=_environment()
                    | {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
                    | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                )
            )
    deadline = time.monotonic() + timeout
    try:
        codes = [process.wait(max(0.1, deadline - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return [
        Ended(code, (folder / f"stderr{rank}.txt").read_text()) for rank, code in enumerate(codes)
    ]


def _environment() -> dict[str, str]:
    return {
        **os.environ,
        # this checkout first, wherever an editable install may point
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT, HERE, WORKERS, ROOT / "benchmarks"))),
        "OMP_NUM_THREADS": "1",
        "ACCELERATE_USE_CPU": "true",
        # the sandbox's host name may not resolve
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }

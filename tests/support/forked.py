"""Starts real processes by forking one that has imported everything: a second each, not ten.

They are ordinary processes on gloo with torchrun's environment variables; only their start differs.
`launch` of processes.py starts them from nothing, by torchrun.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
WORKERS = HERE.parent / "distributed"
PATHS = (ROOT, HERE, WORKERS, ROOT / "benchmarks")


@dataclass(frozen=True)
class Ended:
    """How a process ended.

    Attributes:
        code: its exit code; -9 if it was killed.
        stderr: all that it wrote there.
        result: what it saved as rank<k>.pt; None if it did not.
    """

    code: int
    stderr: str
    result: Any


def run(
    worker: str, folder: Path, world: int, *arguments: str, timeout: int = 240, grace: int = 10
) -> list[Ended]:
    """Run tests/distributed/<worker> in `world` processes until all have ended.

    Args:
        grace: seconds that the others get when one has failed, before they are killed as torchrun
            would do at once.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for earlier in folder.glob("rank*.pt"):
        earlier.unlink()
    request = {
        "worker": str(WORKERS / worker),
        "arguments": [str(folder), *arguments],
        "world": world,
        "folder": str(folder),
        "timeout": timeout,
        "grace": grace,
    }
    imports = {"axolotl": "axolotl", "trl": "trl"}.get(worker.split("_")[0], "trainer_ext")
    server = _server(imports)
    server.stdin.write(json.dumps(request) + "\n")
    server.stdin.flush()
    codes = json.loads(server.stdout.readline())
    return [_ended(folder, rank, code) for rank, code in enumerate(codes)]


def _ended(folder: Path, rank: int, code: int) -> Ended:
    said, saved = folder / f"stderr{rank}", folder / f"rank{rank}.pt"
    result = torch.load(saved, weights_only=True) if saved.is_file() else None
    return Ended(code, said.read_text(errors="replace"), result)


def launch(worker: str, folder: Path, world: int, *arguments: str, timeout: int = 240) -> list:
    """As `run`, for runs that must succeed: what every process saved."""
    ended = run(worker, folder, world, *arguments, timeout=timeout)
    assert not any(e.code for e in ended), "\n".join(e.stderr[-6000:] for e in ended)
    assert not any(e.result is None for e in ended), f"{worker} has not saved its results"
    return [e.result for e in ended]


_servers: dict[str, subprocess.Popen] = {}


def _server(imports: str) -> subprocess.Popen:
    """The process that is forked: Axolotl patches what it imports, so it has one of its own."""
    server = _servers.get(imports)
    if server is None or server.poll() is not None:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, PATHS)),
            "OMP_NUM_THREADS": "1",
            # Asking the CUDA runtime for its devices forbids it to all forks, GPU or not; these two
            # answer "none" without it. The processes compute on the CPU.
            "CUDA_VISIBLE_DEVICES": "",
            "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
            "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
        }
        server = _servers[imports] = subprocess.Popen(
            [sys.executable, __file__, imports],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env=environment,
            cwd=ROOT,  # from where users run the examples
        )
        atexit.register(server.kill)
    return server


def serve() -> None:
    """Answer requests, one a line, until the standard input ends."""
    answers = os.fdopen(os.dup(1), "w")  # what imports print goes elsewhere
    os.dup2(2, 1)
    import torch.distributed.checkpoint
    import torch.distributed.fsdp
    import transformers.models.llama.modeling_llama  # noqa: F401
    from deepspeed.runtime.zero import stage3, stage_1_and_2  # noqa: F401
    from torch.distributed.tensor import DTensor  # noqa: F401

    import trainer_ext  # noqa: F401

    if sys.argv[1] == "axolotl":
        import axolotl.cli.train
        import axolotl.core.builders  # what every training would import
        import axolotl.train  # noqa: F401
        from axolotl_once import save_data_in_this_process

        save_data_in_this_process()
    if sys.argv[1] == "trl":
        from trl import DPOTrainer  # noqa: F401
    torch.set_num_threads(1)
    # Trainers collect garbage several times a run: in a fork that would look through all of the
    # above, and copy the pages that it is on.
    gc.collect()
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(_fork(json.loads(line))), file=answers, flush=True)


def _fork(request: dict) -> list[int]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    world = request["world"]
    pids = [_start(request, rank, port) for rank in range(world)]
    codes: dict[int, int] = {}
    deadline = time.monotonic() + request["timeout"]
    while len(codes) < world:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            codes[pid] = os.waitstatus_to_exitcode(status)
            if codes[pid]:
                deadline = min(deadline, time.monotonic() + request["grace"])
            continue
        if time.monotonic() > deadline:
            for pid in set(pids) - codes.keys():
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    return [codes[pid] for pid in pids]


def _start(request: dict, rank: int, port: int) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    # torch renews its thread pool once after a fork; two threads at a time would find none
    torch.set_num_threads(1)
    try:
        world = request["world"]
        os.environ["ACCELERATE_USE_CPU"] = "true"
        if world > 1:
            os.environ |= {
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
            }
        error = os.open(f"{request['folder']}/stderr{rank}", os.O_CREAT | os.O_TRUNC | os.O_WRONLY)
        os.dup2(error, 2)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.argv = [request["worker"], *request["arguments"]]
        runpy.run_path(request["worker"], run_name="__main__")
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        sys.stdout.flush()
        os._exit(code)


if __name__ == "__main__":
    serve()

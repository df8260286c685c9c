"""Two simulated hosts: network namespaces joined by a virtual cable, each with its own host name,
processes and torchrun agent. What goes from one to the other goes over that cable alone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

from forked import PATHS, WORKERS

CABLE = "spft0"
PORT = 29400
# `ip netns exec` gives its command mounts of its own: nobody else sees these files. No name server
# can be reached, so none is asked.
_AS_HOST = (
    'hostname "$0" && mount --bind "$1" /etc/hosts && mount --bind /dev/null /etc/resolv.conf'
    ' && shift && exec "$@"'
)


def why_not() -> str | None:
    """Why hosts cannot be simulated here; None if they can."""
    name = f"spft{os.getpid()}p"
    try:
        made = _ip("netns", "add", name, check=False)
    except FileNotFoundError:
        return "the command ip (iproute2) is not installed"
    if made.returncode:
        return f"network namespaces cannot be made here: {made.stderr.strip()}"
    try:
        enter = ["ip", "netns", "exec", name, "unshare", "--uts", "sh", "-c", _AS_HOST]
        enter += ["probe", "/etc/hosts", "true"]
        entered = subprocess.run(enter, capture_output=True, text=True)
        cable = _ip("-n", name, "link", "add", CABLE, "type", "veth", check=False)
    finally:
        _ip("netns", "del", name)
    failed = next((done for done in (entered, cable) if done.returncode), None)
    return failed and f"hosts cannot be simulated here: {failed.stderr.strip()}"


@dataclass
class Host:
    """One host.

    Attributes:
        rank: its number, which is that of its only training process too.
        namespace: its network's name on the real machine.
        log: what its processes have written, of all launches.
    """

    rank: int
    namespace: str
    log: Path
    agent: subprocess.Popen | None = field(default=None, repr=False)

    @property
    def name(self) -> str:
        return f"host{self.rank}"

    @property
    def address(self) -> str:
        return f"10.77.0.{self.rank + 1}"

    def start(self, worker: str, *arguments: str, max_restarts: int = 0) -> None:
        """Start torchrun with one process of tests/distributed/<worker>, as on a node of two."""
        enter = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", "sh", "-c", _AS_HOST]
        enter += [self.name, str(self.log.parent / "hosts")]
        agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1"]
        agent += [f"--node-rank={self.rank}", "--rdzv-id=spft", "--rdzv-backend=c10d"]
        agent += [f"--max-restarts={max_restarts}"]
        agent += [f"--rdzv-endpoint=host0:{PORT}", str(WORKERS / worker), *arguments]
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(map(str, PATHS)),
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            "GLOO_SOCKET_IFNAME": CABLE,
            # as spft.sbatch: a restart must not meet the addresses of the processes before it
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        }
        with self.log.open("ab") as log:
            self.agent = subprocess.Popen(
                enter + agent, env=environment, stdout=log, stderr=subprocess.STDOUT
            )

    def wait(self, seconds: float) -> int:
        """The agent's exit code."""
        return self.agent.wait(seconds)

    def cable(self, state: str) -> None:
        """Plug its cable in ("up") or out ("down")."""
        _ip("-n", self.namespace, "link", "set", CABLE, state)

    def kill(self) -> None:
        """End all its processes, as when its power fails."""
        deadline = time.monotonic() + 10
        while pids := _ip("netns", "pids", self.namespace).stdout.split():
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
            if self.agent is not None:
                self.agent.poll()
            assert time.monotonic() < deadline, f"{pids} do not end"
            time.sleep(0.02)


@contextmanager
def two_hosts(folder: Path) -> Iterator[list[Host]]:
    """Hosts 0 and 1, joined; afterwards neither they nor their processes are left."""
    hosts = [Host(k, f"spft{os.getpid()}h{k}", folder / f"host{k}.log") for k in range(2)]
    made: list[Host] = []
    names = "".join(f"{host.address} {host.name}\n" for host in hosts)
    (folder / "hosts").write_text(f"127.0.0.1 localhost\n{names}")
    try:
        for host in hosts:
            _ip("netns", "add", host.namespace)
            made.append(host)
        zero, one = (host.namespace for host in hosts)
        _ip("-n", zero, "link", "add", CABLE, "type", "veth", "peer", CABLE, "netns", one)
        for host in hosts:
            _ip("-n", host.namespace, "addr", "add", f"{host.address}/24", "dev", CABLE)
            _ip("-n", host.namespace, "link", "set", "lo", "up")
            host.cable("up")
        yield hosts
    finally:
        for host in made:
            host.kill()
            _ip("netns", "del", host.namespace)


def _ip(*arguments: str, check: bool = True) -> subprocess.CompletedProcess:
    return subprocess.run(["ip", *arguments], check=check, capture_output=True, text=True)

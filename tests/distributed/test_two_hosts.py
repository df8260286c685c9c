"""A run over two simulated hosts, started by a torchrun agent on each, as on a cluster.

Invariants: its neurons, losses and adapter are those of one process, under DDP and ZeRO-3. When
host 1 loses its network, host 0's run ends with a line that names rank 1 and its host; the same
command, started again on both, ends with the bits of a run that nothing disturbed; and so it does
where torchrun itself starts the processes again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from axolotl_runs import adapter_tensors, same_tensors
from forked import launch
from hosts import Host, two_hosts, why_not
from tiny_models import tiny_model

from trainer_ext.checkpoints.folders import what_is_missing

ENGINES = ("ddp", "zero3")
STEPS, SAVE_STEPS, LOST_AT = 8, 2, 5


@dataclass
class Cluster:
    folder: Path
    hosts: list[Host]

    def options(self, out: str, **more) -> dict:
        arguments = {"save_strategy": "steps", "save_steps": SAVE_STEPS}
        base, out = str(self.folder / "base"), str(self.folder / out)
        return {"base": base, "out": out, "steps": STEPS, "arguments": arguments, **more}

    def start(self, name: str, *jobs: list, max_restarts: int = 0) -> Path:
        """Start these runs on both hosts; they share one file system."""
        folder = self.folder / name
        folder.mkdir()
        for host in self.hosts:
            arguments = str(folder), json.dumps(jobs)
            host.start("two_hosts_worker.py", *arguments, max_restarts=max_restarts)
        return folder

    def finish(self, folder: Path) -> list[dict]:
        """What the ranks saved, when both hosts have ended well."""
        codes = [host.wait(120) for host in self.hosts]
        assert codes == [0, 0], self.hosts[0].log.read_text()[-6000:]
        return [torch.load(folder / f"rank{k}.pt", weights_only=True) for k in range(2)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    reason = why_not()
    if reason:
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("cluster")
    tiny_model().save_pretrained(folder / "base")
    with two_hosts(folder) as hosts:
        yield Cluster(folder, hosts)


@pytest.fixture(scope="module")
def undisturbed(cluster):
    jobs = [[engine, cluster.options(engine), None] for engine in ENGINES]
    return cluster.finish(cluster.start("undisturbed", *jobs))


@pytest.fixture(scope="module")
def alone(cluster):
    options = json.dumps(cluster.options("alone"))
    return launch("run_worker.py", cluster.folder / "one", 1, "none", options)[0]


@pytest.mark.parametrize("engine", ENGINES)
def test_two_hosts_train_as_one_process(cluster, undisturbed, alone, engine):
    for rank in undisturbed:
        result = rank[engine]
        assert result["steps"] == STEPS
        assert result["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        for name, index in alone["index"].items():
            assert torch.equal(result["index"][name], index)
    here = adapter_tensors(cluster.folder / "alone")
    there = adapter_tensors(cluster.folder / engine)
    assert here.keys() == there.keys()
    for name, tensor in here.items():
        if tensor.is_floating_point():
            assert tensor.any()
            assert (there[name] - tensor).norm() <= 1e-4 * tensor.norm(), name


@pytest.mark.full
def test_a_host_that_goes_away_is_named_and_the_next_start_resumes(cluster, undisturbed):
    zero, one = cluster.hosts
    cluster.start("cut", ["ddp", cluster.options("again"), f"unplugged {LOST_AT}"])
    assert zero.wait(90) != 0
    one.kill()
    one.cable("up")
    said = zero.log.read_text().splitlines()
    (line,) = {x for x in said if x.startswith("axolotl-spft:")}
    assert line.startswith("axolotl-spft: rank 1 (host1) has died or cannot be reached")
    assert "last at step" in line
    folders = sorted((cluster.folder / "again").glob("checkpoint-*"))
    assert [path.name for path in folders] == ["checkpoint-2", "checkpoint-4"]
    assert not any(map(what_is_missing, folders))

    ranks = cluster.finish(
        cluster.start("resumed", ["ddp", cluster.options("again", resume=True), None])
    )
    assert [rank["ddp"]["steps"] for rank in ranks] == [STEPS - 4] * 2
    whole, again = (adapter_tensors(cluster.folder / name) for name in ("ddp", "again"))
    assert same_tensors(whole, again)


@pytest.mark.full
def test_torchrun_restarts_a_run_whose_process_dies(cluster, undisturbed):
    options = cluster.options("restarted", resume="auto")
    folder = cluster.start("restart", ["ddp", options, f"killed {LOST_AT}"], max_restarts=1)
    ranks = cluster.finish(folder)
    assert [rank["ddp"]["steps"] for rank in ranks] == [STEPS - 4] * 2
    whole, again = (adapter_tensors(cluster.folder / name) for name in ("ddp", "restarted"))
    assert same_tensors(whole, again)

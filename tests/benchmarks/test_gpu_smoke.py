"""Invariants of benchmarks/gpu_smoke.py: every step runs, also after one that raises, whose error's
first line is printed. Without the first run there is nothing to compare with, and it alone is
named. The exit code says whether all passed."""

from __future__ import annotations

import gpu_smoke
import pytest


def steps(lines: list[str]) -> list[str]:
    """Names of the steps, in the order in which they ended."""
    return [line.split(":")[0] for line in lines if ": passed in " in line or ": FAILED: " in line]


NAMES = ["write_through", "delta", "load", "merge", "resume"]


def test_all_steps_pass_here(capsys):
    assert gpu_smoke.main(["--device", "cpu"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert steps(lines) == NAMES
    assert lines[-1] == "5 of 5 steps passed on cpu"


@pytest.mark.parametrize("name", ["write_through", "delta", "load"])
def test_a_step_that_raises_is_named_and_the_others_run(monkeypatch, capsys, name):
    def fails(self):
        raise RuntimeError("CUDA error: no kernel image\nCompile with TORCH_USE_CUDA_DSA")

    monkeypatch.setattr(gpu_smoke.Smoke, name, fails)
    fails.__name__ = name
    assert gpu_smoke.main(["--device", "cpu"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert steps(lines) == (NAMES if name != "write_through" else NAMES[:1])
    assert lines[-1] == f"{name}: RuntimeError: CUDA error: no kernel image"

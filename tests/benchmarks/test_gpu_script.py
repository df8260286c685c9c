"""Invariants of benchmarks/gpu.sh, run with stand-ins for Python and timeout:

- Its limits sum to at most 570 s, it begins with the 1b table, and it ends even if a part fails.
- Every option it gives is one that the scripts accept.
- Where trainer_ext cannot be imported it stops with a message.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import calibration
import pytest
import step
import step_profile
from tiny_benchmark import BENCHMARKS

PARSERS = {"step.py": step, "step_profile.py": step_profile, "calibration.py": calibration}


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Return a function that runs the script and returns the process and its commands."""

    def run_(fails_at: str = "nothing"):
        log = tmp_path / "commands"
        log.unlink(missing_ok=True)
        stand_in(tmp_path / "python", "exit 0")
        # One line a command: the seconds, then what would be run for so long.
        matches = f'case "$*" in *{fails_at}*) exit 1;; esac'
        stand_in(tmp_path / "timeout", f'printf "%s\\n" "$(echo $*)" >> "{log}"\n{matches}')
        environment = {
            **os.environ,
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
            "PYTHON": str(tmp_path / "python"),
        }
        command = ["bash", str(BENCHMARKS / "gpu.sh"), str(tmp_path / "results")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        return done, [line.split() for line in log.read_text().splitlines()]

    return run_


def stand_in(path: Path, body: str) -> None:
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


def parts(commands: list[list[str]]) -> list[tuple[str, list[str]]]:
    """Script and options of each part; the first command is the check."""
    return [(Path(command[2]).name, command[3:]) for command in commands[1:]]


def test_the_limits_leave_time_within_ten_minutes(run):
    done, commands = run()
    assert done.returncode == 0, done.stderr
    assert sum(int(command[0]) for command in commands) <= 570
    scripts = [name for name, _ in parts(commands)]
    assert scripts == ["step.py"] * 4 + ["step_profile.py", "calibration.py"]
    sizes = [options[options.index("--size") + 1] for _, options in parts(commands)]
    assert sizes == ["1b", "8b", "1b", "8b", "1b", "1b"]
    checkpointing = ["--checkpointing" in options for _, options in parts(commands)]
    assert checkpointing == [False, False, True, True, False, False]


def test_every_option_is_accepted_and_every_result_has_its_own_folder(run, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    for name, options in parts(run()[1]):
        args = PARSERS[name].parse(options)
        assert (args.device, args.dtype) == ("cuda", "bf16")
        assert args.output_dir == tmp_path / "results"


def test_a_part_that_fails_is_named_and_keeps_no_other_from_running(run):
    whole = run()[1]
    done, commands = run(fails_at="8b")
    assert commands == whole
    assert done.returncode == 1
    assert done.stderr.count("failed or took more than") == 2
    assert "s: step.py --size 8b" in done.stderr


def test_it_stops_where_the_packages_are_missing(run):
    done, commands = run(fails_at="trainer_ext")
    assert len(commands) == 1
    assert done.returncode == 1
    assert "cannot import trainer_ext" in done.stderr

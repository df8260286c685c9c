"""Runs the stages of benchmarks/gpu.sh, each in a process with a limit, a log and a verdict.

benchmarks/GPU.md says what each stage proves and how to run them. A stage that raises or exceeds
its limit does not keep the others from running. A stage that has passed is not run again. Results
of different code never meet: each state of the code has a folder of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from fingerprint import code_fingerprint
from gpu_model import PACKAGES_FOLDER, prepare_data
from gpu_plan import STAGES, Stage

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
VERDICT, LOG = "verdict.json", "log.txt"
_PR_SET_PDEATHSIG = 1  # of linux/prctl.h
CODE = ("benchmarks", "quickstart", "tests/cuda", "tests/support")  # besides trainer_ext
PATIENCE = {"cuda": 1, "cpu": 5}  # times a stage's limit: a rehearsal is not about time
FACTS = """
import importlib.metadata as m, json, platform, torch
cuda = torch.cuda.is_available()
names = ("torch", "transformers", "peft", "accelerate", "safetensors", "bitsandbytes")
found = {d.metadata["Name"].lower(): d.version for d in m.distributions()}
print(json.dumps({
    "device": torch.cuda.get_device_name() if cuda else "cpu",
    "cuda": torch.version.cuda if cuda else None,
    "python": platform.python_version(),
    **{name: found.get(name, "not installed") for name in names},
}))
import trainer_ext
"""


@dataclass
class Run:
    """One call: where it writes, on what device, until when."""

    output: Path
    device: str
    deadline: float
    facts: dict = field(default_factory=dict)

    def stage(self, stage: Stage, again: bool) -> bool:
        """Run a stage unless it has passed.

        Returns:
            whether it has passed; on a GPU also if it lacks what it needs.
        """
        folder = self.output / stage.name
        if not again and passed(folder, self.facts) and stage.leaves():
            print(f"{stage.name}: passed before", flush=True)
            return True
        missing = stage.lacks()
        if missing:
            print(f"{stage.name}: left out, {missing}", flush=True)
            return self.device == "cuda"  # a rehearsal is of all stages
        limit = min(PATIENCE[self.device] * stage.seconds, self.deadline - time.monotonic())
        if limit < stage.usual:
            print(f"{stage.name}: not begun, the call's time is used up; call again", flush=True)
            return False
        folder.mkdir(parents=True, exist_ok=True)
        shown = Path(os.path.relpath(folder, ROOT))  # commands stand in the results
        command = [sys.executable, *stage.command(self.device, shown, limit)]
        started = time.monotonic()
        code = run_limited(command, folder / LOG, limit, environment(stage.packages))
        seconds = time.monotonic() - started
        if code == 0 and stage.says:
            try:
                said = stage.says(folder)
            except Exception as error:  # a script that wrote no figures must not end the call
                code, said = 1, f"no verdict: {error!r}"
        elif code == 0:
            said = last_line(folder / LOG)
        elif code is None:
            said = f"exceeded {limit:.0f} s; {last_line(folder / LOG)}"
        else:
            said = f"exit code {code}; {last_line(folder / LOG)}"
        verdict = {
            "stage": stage.name,
            "passed": code == 0,
            "says": said,
            "seconds": round(seconds, 1),
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": shlex.join(["python", *command[1:]]),
            **self.facts,
        }
        prepare_data.write_whole(folder / VERDICT, (json.dumps(verdict, indent=1) + "\n").encode())
        word = "passed" if code == 0 else "FAILED"
        print(f"{stage.name}: {word} in {seconds:.0f} s: {said}", flush=True)
        return code == 0


def passed(folder: Path, facts: dict) -> bool:
    """Whether a stage's folder holds the verdict that it has passed with this code and torch."""
    try:
        verdict = json.loads((folder / VERDICT).read_text())
        same = all(verdict[key] == facts[key] for key in ("code", "torch"))
        return verdict["passed"] is True and same
    except (OSError, ValueError, KeyError, TypeError):
        return False


def run_limited(command: list[str], log: Path, limit: float, env: dict) -> int | None:
    """Run a command into a log; its exit code, None if it took longer and was ended."""
    with log.open("w") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=env,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:  # also its own children, also where this script is interrupted
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def die_with_parent() -> None:
    """Let this process be killed when its parent is, however that ends (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def environment(packages: bool = False) -> dict[str, str]:
    """This clone's packages and, if asked for, the carried ones; no hub; segments that grow."""
    paths = [ROOT, *([PACKAGES_FOLDER] if packages else []), os.environ.get("PYTHONPATH")]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(str(path) for path in paths if path),
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }


def last_line(log: Path) -> str:
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "it printed nothing")


def machine_facts() -> dict:
    """Device, driver and versions, from a process that also imports trainer_ext.

    Raises:
        SystemExit: it cannot.
    """
    done = subprocess.run(
        [sys.executable, "-c", FACTS],
        cwd=ROOT,
        env=environment(packages=True),
        capture_output=True,
        text=True,
    )
    if done.returncode:
        reason = (done.stderr.strip() or "it printed nothing").splitlines()[-1]
        raise SystemExit(f"error: {sys.executable} cannot import trainer_ext: {reason}")
    facts = json.loads(done.stdout.strip().splitlines()[-1])
    files = [file for folder in CODE for file in (ROOT / folder).glob("*.py")]
    facts["code"] = code_fingerprint([*files, ROOT / "tests" / "conftest.py"])
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        facts["driver"] = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    except OSError:
        facts["driver"] = None
    return facts


def main(argv: list[str] | None = None) -> int:
    """Run the stages; returns 0 if each has passed, or lacks what it needs."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    names = [stage.name for stage in STAGES]
    parser.add_argument("--stages", nargs="+", choices=names, default=names)
    parser.add_argument("--again", action="store_true", help="also those that have passed")
    parser.add_argument("--seconds", type=float, help="limit of the call; on a GPU 570 if unset")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu-DEVICE/CODE")
    args = parser.parse_args(argv)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the stage is ended, too
    unset = 570 if args.device == "cuda" else math.inf
    deadline = time.monotonic() + (unset if args.seconds is None else args.seconds)
    facts = machine_facts()
    if args.device == "cuda" and facts["device"] == "cpu":
        parser.error("torch sees no GPU; rehearse with --device cpu")
    slug = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    folder = args.output or RESULTS / f"gpu-{slug}" / facts["code"]
    run = Run(folder.resolve(), args.device, deadline, facts)
    print(" ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    results = [run.stage(s, args.again) for s in STAGES if s.name in args.stages]
    print(f"{sum(results)} of {len(results)} stages passed or left out; {run.output}", flush=True)
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())

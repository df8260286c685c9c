"""Runs the stages of benchmarks/gpu.sh, each in a process with a limit, a log and a verdict.

benchmarks/GPU.md says what each stage proves and how to run them. A stage that raises or exceeds
its limit does not keep the others from running. A stage that has passed is not run again.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from gpu_model import DATA, MODEL, PACKAGES_FOLDER, PARTS

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
VERDICT, LOG = "verdict.json", "log.txt"
LEAST_SECONDS = 20  # a stage with less time than this left is not begun
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


@dataclass(frozen=True)
class Stage:
    """One line of the plan.

    Attributes:
        name: of the stage and of its folder.
        seconds: its limit on a GPU; estimates are for an H100 with 80 GB.
        command: arguments of Python, from the device and the stage's folder.
        says: the verdict of a stage that passed, from its folder; by default its log's last line.
        lacks: what is not there that it needs, or None.
        packages: whether it gets the packages that were carried.
    """

    name: str
    seconds: int
    command: Callable[[str, Path], list[str]]
    says: Callable[[Path], str] | None = None
    lacks: Callable[[], str | None] = lambda: None
    packages: bool = False


def _benchmark(script: str, *options: str) -> Callable[[str, Path], list[str]]:
    """The command of a benchmark; on the CPU with the smallest model, a few tokens and rounds."""

    def command(device: str, folder: Path) -> list[str]:
        sizes = options if device == "cuda" else _as_tiny(options)
        where = ("--device", device, "--dtype", "bf16", "--output-dir", str(folder))
        return [f"benchmarks/{script}", *sizes, *where]

    return command


def _script(name: str) -> Callable[[str, Path], list[str]]:
    """The command of a script of this folder that takes a size."""

    def command(device: str, folder: Path) -> list[str]:
        size = "1b" if device == "cuda" else "tiny"
        where = ("--device", device, "--output-dir", str(folder))
        return [f"benchmarks/{name}", "--size", size, *where]

    return command


def _as_tiny(options: tuple[str, ...]) -> tuple[str, ...]:
    smallest = {"--size": "tiny", "--batch-size": "2", "--seq-len": "16", "--repeats": "2"}
    return tuple(
        smallest.get(options[i - 1], option) if i else option for i, option in enumerate(options)
    )


def _figures(folder: Path) -> dict:
    return json.loads(next(folder.glob("*/figures.json")).read_text())


def _step_verdict(folder: Path) -> str:
    report = _figures(folder)
    parts = [
        f"{name} {row['ratio_to_frozen']:.3f} x frozen, {row['peak_bytes'] / 2**30:.2f} GiB"
        if "ratio_to_frozen" in row
        else f"{name} out of memory"
        for name, row in report["methods"].items()
    ]
    goals = [
        f"{goal['figure']} {goal['measured']:.3f} {'met' if goal['met'] else 'missed'}"
        for goal in report["goals"]
    ]
    return f"{report['rounds']} rounds; " + "; ".join(parts + goals)


def _calibration_verdict(folder: Path) -> str:
    rows = _figures(folder)["rows"]
    return "; ".join(
        f"{name} {row['ratio_to_frozen']:.2f} x frozen"
        for name, row in rows.items()
        if row.get("ratio_to_frozen")
    )


def _no_parts() -> str | None:
    missing = [part.name for part in PARTS if not part.is_file()]
    return f"{' and '.join(missing)} of the packed model not carried" if missing else None


def _no_model() -> str | None:
    return None if MODEL.is_dir() else "the model is not unpacked"


def _no_bitsandbytes() -> str | None:
    found = (PACKAGES_FOLDER / "bitsandbytes").is_dir()
    return None if found else "bitsandbytes was not carried"


# 4096 tokens a batch: enough that the GPU computes rather than waits for Python.
_1B = ("--size", "1b", "--batch-size", "4", "--seq-len", "1024")
_8B = ("--size", "8b", "--batch-size", "1", "--seq-len", "1024")
_8B_LONG = ("--size", "8b", "--batch-size", "1", "--seq-len", "8192")
# At 8b there is room for two copies of the base: DoRA and SHiRA make dense copies of the weights
# in every step, full fine-tuning needs 64 GB for itself, LoRA-FA inverts 224 matrices a step.
_FEW = ("--methods", "frozen", "spft_write_through", "spft_delta", "lora")
# The most valuable first.
STAGES = [
    Stage("smoke", 45, lambda device, folder: ["benchmarks/gpu_smoke.py", "--device", device]),
    Stage(
        "correct",
        120,
        lambda device, folder: ["-m", "pytest", "-m", "cuda", "-q", "--no-header", "tests/cuda"],
    ),
    Stage(
        "step-1b",
        110,
        _benchmark("step.py", *_1B, "--repeats", "20", "--time-limit", "40"),
        _step_verdict,
    ),
    Stage("kernels", 45, _script("gpu_kernels.py")),
    Stage(
        "step-8b-long",
        80,
        _benchmark(
            "step.py", *_8B_LONG, "--repeats", "8", "--time-limit", "20", "--checkpointing", *_FEW
        ),
        _step_verdict,
    ),
    Stage(
        "model",
        90,
        lambda device, folder: ["benchmarks/gpu_model.py", "unpack"],
        lacks=_no_parts,
        packages=True,
    ),
    Stage(
        "quality",
        240,
        lambda device, folder: [
            *("benchmarks/quality.py", "--model", str(MODEL), "--data", str(DATA)),
            *("--device", device, "--output-dir", str(folder)),
            *(_QUALITY if device == "cuda" else _QUALITY_REHEARSED),
        ],
        lacks=_no_model,
    ),
    Stage(
        "calibration-1b",
        75,
        _benchmark("calibration.py", *_1B, "--repeats", "3", "--zo-directions", "2"),
        _calibration_verdict,
    ),
    Stage(
        "profile-1b",
        50,
        _benchmark("step_profile.py", *_1B, "--repeats", "5"),
    ),
    Stage(
        "four-bit",
        90,
        _script("gpu_four_bit.py"),
        lacks=_no_bitsandbytes,
        packages=True,
    ),
    Stage(
        "step-8b",
        80,
        _benchmark("step.py", *_8B, "--repeats", "20", "--time-limit", "25", *_FEW),
        _step_verdict,
    ),
    Stage(
        "step-1b-checkpointing",
        80,
        _benchmark(
            "step.py",
            *_1B,
            "--repeats",
            "10",
            "--time-limit",
            "25",
            "--checkpointing",
            *("--methods", "frozen", "spft_write_through", "spft_delta", "lora", "miss", "shira"),
        ),
        _step_verdict,
    ),
]
_QUALITY = (
    *("--cases", "random", "group_taylor", "lora", "taylor", "wanda", "magnitude"),
    *("--learning-rates", "1e-3", "5e-4", "3e-3", "--seeds", "42", "43"),
    *("--max-steps", "60", "--rows", "8", "--workers", "8", "--time-limit", "140"),
)
_QUALITY_REHEARSED = (
    *("--cases", "random", "lora", "--seeds", "42", "--learning-rates", "1e-3", "--workers", "2"),
    *("--max-steps", "2", "--rows", "4", "--held-out", "8", "--calibration-batches", "1"),
)


@dataclass
class Run:
    """One call: where it writes, on what device, until when."""

    output: Path
    device: str
    deadline: float
    facts: dict = field(default_factory=dict)

    def stage(self, stage: Stage, again: bool) -> bool:
        """Run a stage unless it has passed; returns whether it has passed or cannot run here."""
        folder = self.output / stage.name
        if not again and passed(folder):
            print(f"{stage.name}: passed before", flush=True)
            return True
        missing = stage.lacks()
        if missing:
            print(f"{stage.name}: left out, {missing}", flush=True)
            return True
        limit = min(stage.seconds, self.deadline - time.monotonic())
        if limit < min(LEAST_SECONDS, stage.seconds):
            print(f"{stage.name}: not begun, the call's time is used up; call again", flush=True)
            return False
        folder.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, *stage.command(self.device, folder)]
        started = time.monotonic()
        code = run_limited(command, folder / LOG, limit, environment(stage.packages))
        seconds = time.monotonic() - started
        if code == 0:
            said = stage.says(folder) if stage.says else last_line(folder / LOG)
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
            "command": " ".join(["python", *command[1:]]).replace(str(ROOT) + os.sep, ""),
            **self.facts,
        }
        write_whole(folder / VERDICT, json.dumps(verdict, indent=1) + "\n")
        word = "passed" if code == 0 else "FAILED"
        print(f"{stage.name}: {word} in {seconds:.0f} s: {said}", flush=True)
        return code == 0


def passed(folder: Path) -> bool:
    """Whether a stage's folder holds the verdict that it has passed."""
    try:
        return json.loads((folder / VERDICT).read_text())["passed"] is True
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
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:  # also its own children, also where this script is interrupted
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


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


def write_whole(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    part.replace(path)


def machine_facts() -> dict:
    """Device, driver and versions, from a process that also imports trainer_ext.

    Raises:
        SystemExit: it cannot.
    """
    done = subprocess.run(
        [sys.executable, "-c", FACTS], cwd=ROOT, env=environment(), capture_output=True, text=True
    )
    if done.returncode:
        reason = (done.stderr.strip() or "it printed nothing").splitlines()[-1]
        raise SystemExit(f"error: {sys.executable} cannot import trainer_ext: {reason}")
    facts = json.loads(done.stdout.strip().splitlines()[-1])
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
    parser.add_argument("--seconds", type=float, default=570, help="limit of the whole call")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/gpu-DEVICE")
    args = parser.parse_args(argv)
    deadline = time.monotonic() + args.seconds
    facts = machine_facts()
    if args.device == "cuda" and facts["device"] == "cpu":
        parser.error("torch sees no GPU; rehearse with --device cpu")
    slug = re.sub(r"[^a-z0-9]+", "-", facts["device"].lower()).strip("-")
    run = Run(args.output or RESULTS / f"gpu-{slug}", args.device, deadline, facts)
    print(" ".join(f"{key} {value}" for key, value in facts.items()), flush=True)
    results = [run.stage(s, args.again) for s in STAGES if s.name in args.stages]
    print(f"{sum(results)} of {len(results)} stages passed or left out; {run.output}", flush=True)
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main())

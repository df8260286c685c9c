"""The stages of benchmarks/gpu.sh in their order, the most valuable first.

Limits and usual times are for an H100 with 80 GB; those of the stages that have not passed on one
yet (GPU.md names them) are estimates.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from gpu_model import DATA, MODEL, PACKAGES_FOLDER, PARTS

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Stage:
    """One line of the plan.

    Attributes:
        name: of the stage and of its folder.
        seconds: its limit.
        usual: what it takes; with less time left it is not begun.
        command: arguments of Python, from the device, the stage's folder and the seconds it has.
        says: the verdict of a stage that passed, from its folder; by default its log's last line.
        lacks: what is not there that it needs, or None.
        packages: whether it gets the packages that were carried.
        leaves: whether what it has made is still there; without it a stage has not passed.
    """

    name: str
    seconds: int
    usual: int
    command: Callable[[str, Path, float], list[str]]
    says: Callable[[Path], str] | None = None
    lacks: Callable[[], str | None] = lambda: None
    packages: bool = False
    leaves: Callable[[], bool] = lambda: True


def _benchmark(script: str, *options: str) -> Callable[[str, Path, float], list[str]]:
    """The command of a benchmark; on the CPU with the smallest model, a few tokens and rounds."""

    def command(device: str, folder: Path, seconds: float) -> list[str]:
        sizes = options if device == "cuda" else _as_tiny(options)
        where = ("--device", device, "--dtype", "bf16", "--output-dir", str(folder))
        return [f"benchmarks/{script}", *sizes, *where]

    return command


def _script(name: str) -> Callable[[str, Path, float], list[str]]:
    """The command of a script of this folder that takes a size."""

    def command(device: str, folder: Path, seconds: float) -> list[str]:
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


def _profile_verdict(folder: Path) -> str:
    report = _figures(folder)
    kernels = sum(operator["difference_ms"] for operator in report["operators"])
    phases = "; ".join(
        f"{row['phase']} {row['floor_ms']:.1f} -> {row['method_ms']:.1f} ms"
        for row in report["phases"]
    )
    return f"{report['method']}: {phases}; operators {kernels:+.2f} ms"


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
    Stage(
        "smoke",
        45,
        20,
        lambda device, folder, seconds: ["benchmarks/gpu_smoke.py", "--device", device],
    ),
    Stage(
        "correct",
        120,
        65,
        lambda device, folder, seconds: [
            "-m",
            "pytest",
            "-m",
            "cuda",
            "-q",
            "--no-header",
            "tests/cuda",
        ],
    ),
    Stage(
        "step-1b",
        110,
        65,
        _benchmark("step.py", *_1B, "--repeats", "20", "--time-limit", "40"),
        _step_verdict,
    ),
    Stage("kernels", 45, 25, _script("gpu_kernels.py")),
    Stage(
        "step-8b-long",
        110,
        90,
        _benchmark(
            "step.py", *_8B_LONG, "--repeats", "4", "--time-limit", "25", "--checkpointing", *_FEW
        ),
        _step_verdict,
    ),
    Stage(
        "model",
        90,
        45,
        lambda device, folder, seconds: ["benchmarks/gpu_model.py", "unpack"],
        lacks=_no_parts,
        packages=True,
        leaves=MODEL.is_dir,
    ),
    Stage(
        "quality",
        200,
        60,
        lambda device, folder, seconds: [
            *("benchmarks/quality.py", "--model", os.path.relpath(MODEL, ROOT)),
            *("--data", os.path.relpath(DATA, ROOT)),
            *("--device", device, "--output-dir", str(folder)),
            *("--time-limit", str(max(1, int(seconds) - _LAST_RUNS))),
            *(_QUALITY if device == "cuda" else _QUALITY_REHEARSED),
        ],
        lacks=_no_model,
    ),
    Stage(
        "calibration-1b",
        75,
        35,
        _benchmark("calibration.py", *_1B, "--repeats", "3", "--zo-directions", "2"),
        _calibration_verdict,
    ),
    Stage(
        "profile-1b",
        50,
        35,
        _benchmark("step_profile.py", *_1B, "--repeats", "5"),
        _profile_verdict,
    ),
    Stage(
        "four-bit",
        90,
        45,
        _script("gpu_four_bit.py"),
        lacks=_no_bitsandbytes,
        packages=True,
    ),
    Stage(
        "step-8b",
        80,
        60,
        _benchmark("step.py", *_8B, "--repeats", "20", "--time-limit", "25", *_FEW),
        _step_verdict,
    ),
    Stage(
        "step-1b-checkpointing",
        80,
        60,
        _benchmark(
            "step.py",
            *(*_1B, "--repeats", "10", "--time-limit", "25", "--checkpointing"),
            *("--methods", "frozen", "spft_write_through", "spft_delta", "lora", "miss", "shira"),
        ),
        _step_verdict,
    ),
]
_LAST_RUNS = 45  # seconds that start, the runs under way and the table may take
_QUALITY = (
    *("--cases", "random", "group_taylor", "lora", "taylor", "wanda", "magnitude"),
    *("--learning-rates", "1e-3", "5e-4", "3e-3", "--seeds", "42", "43"),
    *("--max-steps", "60", "--rows", "8", "--workers", "2"),
)
_QUALITY_REHEARSED = (
    *("--cases", "random", "lora", "--seeds", "42", "--learning-rates", "1e-3", "--workers", "2"),
    *("--max-steps", "2", "--rows", "4", "--held-out", "8", "--calibration-batches", "1"),
)

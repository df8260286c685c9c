"""What the benchmarks share: options, timed rounds, ratios, and the making of reports."""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import math
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from datetime import datetime, timezone
from pathlib import Path

import torch
from transformers.utils import is_flash_attn_2_available
from workload import ATTENTIONS, DTYPES, SIZES

from trainer_ext.files.atomic import write_bytes

# of glibc's malloc.h
_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "axolotl-spft")


def add_options(parser: argparse.ArgumentParser, output: str) -> None:
    """Add the options of the model, the machine and the rounds.

    Args:
        output: what is written where, for the help.
    """
    parser.add_argument("--size", choices=SIZES, default="135m", help="shape of the model")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the base weights")
    parser.add_argument("--seq-len", type=positive, default=256, help="tokens of a sample")
    parser.add_argument("--batch-size", type=positive, default=4, help="samples of a step")
    parser.add_argument(
        "--r", type=positive, help="neurons SPFT trains in a layer; about 5 %% of weights if unset"
    )
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing")
    parser.add_argument("--attention", choices=ATTENTIONS, default="sdpa", help="implementation")
    parser.add_argument("--repeats", type=positive, default=10, help="timed rounds")
    parser.add_argument("--threads", type=positive, help="CPU threads; torch's choice if unset")
    parser.add_argument(
        "--output-dir", type=Path, default=Path(__file__).parent / "results", help=output
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")


def parse_gpu_stage(doc: str, argv: list[str] | None) -> argparse.Namespace:
    """Options of the scripts that are a stage of gpu.sh alone."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda")
    parser.add_argument("--size", choices=SIZES, default="1b", help="shape of the model")
    parser.add_argument("--output-dir", type=Path, required=True)
    return parser.parse_args(argv)


def settle_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in what depends on the machine or on other options; set torch's threads."""
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda but torch sees no GPU; use --device cpu")
    if args.attention == "flash_attention_2":
        # transformers tells this in a traceback, after it has looked for a kernel to download
        if not is_flash_attn_2_available():
            parser.error(
                "--attention is flash_attention_2 but flash-attn is not installed for a GPU; use "
                "--attention sdpa"
            )
        if args.dtype == "fp32":
            parser.error("--attention is flash_attention_2 but --dtype is fp32; use --dtype bf16")
    args.r = args.r or SIZES[args.size].r
    if args.threads:
        torch.set_num_threads(args.threads)


def keep_freed_memory() -> None:
    """Let the C library keep freed memory, as torch's CUDA allocator does; glibc alone can be told.

    Else it gives large blocks back to the system at once, and getting them anew, page by page,
    takes longer the more activations a method keeps: 90 ms of a step of 135m, whatever it computes.
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(_M_MMAP_MAX, 0)
            mallopt(_M_TRIM_THRESHOLD, -1)  # never
            mallopt(_M_ARENA_MAX, 1)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def time_rounds(
    steps: dict[str, Callable[[], None]],
    repeats: int,
    device: torch.device,
    around: Callable[[str], AbstractContextManager] = lambda name: nullcontext(),
    time_limit: float = math.inf,
) -> dict[str, list[float]]:
    """Seconds of every step in every round; a round runs each of them once.

    Each round begins with another one, so that none always follows the same neighbour's end of
    round; what slows the machine for a while slows all of them.

    Args:
        around: from a step's name to what must be in place while it runs; entered and left untimed.
        time_limit: no round begins when so many seconds have passed, but for the first.
    """
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    start = time.perf_counter()
    for round_ in range(repeats):
        if round_ and time.perf_counter() - start > time_limit:
            break
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            with around(name):
                seconds[name].append(time_once(steps[name], device))
    return seconds


def time_once(work: Callable[[], object], device: torch.device) -> float:
    """Seconds of one run, with all that it has put on the device."""
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_figures(seconds: list[float]) -> dict:
    """All times of something and their median, least and most."""
    return {
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "min_seconds": min(seconds),
        "max_seconds": max(seconds),
    }


def ratio_figures(key: str, seconds: list[float], floor: list[float]) -> dict:
    """Median, least and most of the ratios of two times of the same round, under `key`."""
    ratios = [mine / its for mine, its in zip(seconds, floor, strict=True)]
    return {
        key: statistics.median(ratios),
        f"min_{key}": min(ratios),
        f"max_{key}": max(ratios),
    }


def describe_machine(device: torch.device) -> dict:
    """Name the processor and, where it is used, the GPU."""
    machine = {
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(),
    }
    if device.type == "cuda":
        machine["gpu"] = torch.cuda.get_device_name(device)
    return machine


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def make_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "not installed"  # run from a clone
    return versions


def make_report(script: str, arguments: list[str], args: argparse.Namespace, **figures) -> dict:
    """The figures with the command, the date, the options, the machine and the versions."""
    options = {k: v for k, v in vars(args).items() if k not in ("output_dir", "threads")}
    return {
        "command": shlex.join(["python", f"benchmarks/{script}", *arguments]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "options": options,
        "machine": describe_machine(torch.device(args.device)),
        "versions": make_versions(),
        **figures,
    }


def render_head(title: str, report: dict, shown: str = "median (min-max)") -> list[str]:
    """Heading and circumstances of a report, as lines of markdown.

    Args:
        shown: what of the rounds its tables show.
    """
    options, machine = report["options"], report["machine"]
    processor = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    checkpointing = "on" if options["checkpointing"] else "off"
    compiled = ", compiled" if options.get("compile") else ""
    rounds = report.get("rounds", options["repeats"])
    return [
        f"# {title}: {options['size']}, {options['dtype']}, {options['device']}",
        "",
        f"`{report['command']}`",
        "",
        f"- batch {options['batch_size']} x {options['seq_len']} tokens, activation checkpointing "
        f"{checkpointing}, {options['attention']} attention{compiled}, {shown} of "
        f"{rounds} interleaved rounds",
        f"- {processor}; {machine['cores']} cores; {report['date']}",
        "- " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        "",
    ]


def spread(row: dict, key: str, middle: str) -> str:
    return f"{row[middle]:.3f} ({row[key.format('min')]:.3f}-{row[key.format('max')]:.3f})"


def mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def run_name(script: str, args: argparse.Namespace) -> str:
    """What a run's results are called."""
    # Each of these is another experiment; it must not replace the plain one's figures.
    suffix = "-checkpointing" if args.checkpointing else ""
    suffix += "-compile" if getattr(args, "compile", False) else ""
    suffix += "" if args.attention == "sdpa" else f"-{args.attention}"
    return f"{script}-{args.size}-{args.dtype}-{args.device}{suffix}"


def write_report(report: dict, page: str, folder: Path, picture: str | None = None) -> None:
    """Print the page, and write it, the figures and the picture."""
    print(page, end="")
    write_bytes(folder / "figures.json", (json.dumps(report, indent=1) + "\n").encode())
    write_bytes(folder / "table.md", page.encode())
    if picture is not None:
        write_bytes(folder / "picture.svg", picture.encode())

"""Times one training step of SPFT, LoRA and full fine-tuning against the frozen model's own pass.

Run `python benchmarks/step.py --help` for the options; benchmarks/README.md says how to read the
table. Weights and tokens are random: a step's cost does not depend on their values.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path

import torch
from memory import peak_bytes_above_start
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from trainer_ext import SpftConfig, SpftError, select_neurons
from trainer_ext.files import write_bytes
from trainer_ext.report import optimizer_state_bytes
from trainer_ext.tuner.targets import default_target_modules

SEED = 0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PACKAGES = ("torch", "transformers", "peft", "axolotl-spft")


@dataclass(frozen=True)
class Size:
    """A Llama shape, and the `r` at which SPFT trains about 5 % of its weights."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool
    r: int


SIZES = {
    "tiny": Size(64, 128, 2, 4, 2, 256, True, 8),
    "135m": Size(576, 1536, 30, 9, 3, 49152, True, 48),  # SmolLM2-135M
    "1b": Size(2048, 8192, 16, 32, 8, 128256, True, 192),  # Llama-3.2-1B
    "8b": Size(4096, 14336, 32, 32, 8, 128256, False, 320),  # Llama-3.1-8B
}


@dataclass
class Workload:
    """What every method is given: the same initial model and the same batch."""

    size: Size
    dtype: torch.dtype
    device: torch.device
    seq_len: int
    batch_size: int
    r: int
    checkpointing: bool

    def base_model(self) -> LlamaForCausalLM:
        """Build the base model anew, in train mode; the same weights at every call."""
        size = self.size
        config = LlamaConfig(
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            vocab_size=size.vocab,
            tie_word_embeddings=size.tied,
            max_position_embeddings=max(8192, self.seq_len),
            use_cache=False,
        )
        torch.manual_seed(SEED)
        with torch.device(self.device):
            model = LlamaForCausalLM._from_config(config, dtype=self.dtype)
        if self.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train()

    def batch(self) -> dict[str, torch.Tensor]:
        """Return random tokens, each also a label."""
        generator = torch.Generator().manual_seed(SEED)
        shape = (self.batch_size, self.seq_len)
        tokens = torch.randint(self.size.vocab, shape, generator=generator).to(self.device)
        return {"input_ids": tokens, "labels": tokens}


@dataclass
class Method:
    """A method ready to be timed: `step` runs one training step and leaves no gradients behind."""

    step: Callable[[], None]
    model: nn.Module
    trainable: list[nn.Parameter]
    optimizer: torch.optim.Optimizer | None = None
    note: str = ""


def build_frozen(work: Workload) -> Method:
    """Forward and backward to the embeddings' output, with nothing to train."""
    model = work.base_model().requires_grad_(False)
    model.enable_input_require_grads()
    batch = work.batch()

    def step() -> None:
        model(**batch).loss.backward()

    return Method(step, model, [])


def build_spft(work: Workload) -> Method:
    """SPFT on the delta path, neurons selected by magnitude."""
    model = get_peft_model(work.base_model(), SpftConfig(r=work.r, importance="magnitude"))
    select_neurons(model)
    return _with_adamw(model, work, note=f"r = {work.r}")


def build_lora(work: Workload) -> Method:
    """LoRA on SPFT's layers, at the rank whose trainable parameters are nearest to SPFT's."""
    model = work.base_model()
    targets = default_target_modules(model)
    layers = [model.get_submodule(name) for name in targets]
    budget = work.r * sum(layer.in_features for layer in layers)
    per_rank = sum(layer.in_features + layer.out_features for layer in layers)
    rank = max(1, round(budget / per_rank))
    model = get_peft_model(model, LoraConfig(r=rank, target_modules=targets))
    return _with_adamw(model, work, note=f"rank {rank}")


def build_full(work: Workload) -> Method:
    """Full fine-tuning: every parameter, its AdamW state in the model's dtype."""
    return _with_adamw(work.base_model(), work)


# A method is one function here: it gets a fresh base model from the workload.
METHODS: dict[str, Callable[[Workload], Method]] = {
    "frozen": build_frozen,
    "spft": build_spft,
    "lora": build_lora,
    "full": build_full,
}


def _with_adamw(model: nn.Module, work: Workload, note: str = "") -> Method:
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable)
    batch = work.batch()

    def step() -> None:
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return Method(step, model, trainable, optimizer, note)


def time_rounds(
    steps: dict[str, Callable[[], None]], repeats: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of every step in every round; a round runs each of them once.

    Each round begins with another one, so that none always follows the same neighbour's end of
    round; what slows the machine for a while slows all of them.
    """
    names = list(steps)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for round_ in range(repeats):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            _synchronize(device)
            start = time.perf_counter()
            steps[name]()
            _synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    return seconds


def measure(
    names: list[str], work: Workload, warmup: int, repeats: int, log: Callable[[str], None]
) -> dict[str, dict]:
    """Build all methods, warm them up, then take their memory and their times."""
    methods = {}
    for name in names:
        log(f"building {name}")
        methods[name] = METHODS[name](work)
        for _ in range(warmup):
            methods[name].step()
    step_bytes = {}
    for name, method in methods.items():
        log(f"memory of {name}")
        step_bytes[name] = peak_bytes_above_start(method.step, work.device)
    log(f"timing {repeats} rounds")
    seconds = time_rounds({n: m.step for n, m in methods.items()}, repeats, work.device)
    return {
        name: _figures(method, seconds[name], seconds["frozen"], step_bytes[name])
        for name, method in methods.items()
    }


def _figures(method: Method, seconds: list[float], frozen: list[float], step_bytes: int) -> dict:
    ratios = [mine / floor for mine, floor in zip(seconds, frozen, strict=True)]
    weights = [*method.model.parameters(), *method.model.buffers()]
    return {
        "note": method.note,
        "seconds": seconds,
        "median_seconds": statistics.median(seconds),
        "min_seconds": min(seconds),
        "max_seconds": max(seconds),
        "ratio_to_frozen": statistics.median(ratios),
        "min_ratio_to_frozen": min(ratios),
        "max_ratio_to_frozen": max(ratios),
        "trainable_parameters": sum(p.numel() for p in method.trainable),
        "weight_bytes": sum(t.numel() * t.element_size() for t in weights),
        "optimizer_state_bytes": optimizer_state_bytes(method.optimizer) if method.optimizer else 0,
        "step_peak_bytes": step_bytes,
    }


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    return versions | {package: importlib.metadata.version(package) for package in PACKAGES}


def render(report: dict) -> str:
    """Render the report as a markdown page with one table."""
    options, machine = report["options"], report["machine"]
    processor = machine.get("gpu") or f"{machine['cpu']}, {machine['threads']} threads"
    checkpointing = "on" if options["checkpointing"] else "off"
    lines = [
        f"# Step cost: {options['size']}, {options['dtype']}, {options['device']}",
        "",
        f"`{report['command']}`",
        "",
        f"- batch {options['batch_size']} x {options['seq_len']} tokens, activation checkpointing "
        f"{checkpointing}, median (min-max) of {options['repeats']} interleaved rounds",
        f"- {processor}; {machine['cores']} cores; {report['date']}",
        "- " + ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
        "",
        "| method | s/step | x frozen | trainable | optimizer state | weights | step memory |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in report["methods"].items():
        cells = [
            name + (f" ({row['note']})" if row["note"] else ""),
            _spread(row, "{}_seconds", "median_seconds"),
            _spread(row, "{}_ratio_to_frozen", "ratio_to_frozen"),
            f"{row['trainable_parameters']:,}",
            _mebibytes(row["optimizer_state_bytes"]),
            _mebibytes(row["weight_bytes"]),
            _mebibytes(row["step_peak_bytes"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _spread(row: dict, key: str, middle: str) -> str:
    return f"{row[middle]:.3f} ({row[key.format('min')]:.3f}-{row[key.format('max')]:.3f})"


def _mebibytes(count: int) -> str:
    return f"{count / 2**20:,.1f} MiB"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options; a wrong one ends the program with a message."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="135m", help="shape of the model")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of the base weights")
    parser.add_argument("--seq-len", type=_positive, default=256, help="tokens of a sample")
    parser.add_argument("--batch-size", type=_positive, default=4, help="samples of a step")
    parser.add_argument(
        "--r", type=_positive, help="neurons SPFT trains in a layer; about 5 %% of weights if unset"
    )
    parser.add_argument("--checkpointing", action="store_true", help="activation checkpointing")
    parser.add_argument("--repeats", type=_positive, default=10, help="timed rounds")
    parser.add_argument("--warmup", type=_positive, default=2, help="untimed steps of each method")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        help="what to time; the frozen floor always is",
    )
    parser.add_argument("--threads", type=_positive, help="CPU threads; torch's choice if unset")
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path(__file__).parent / "results",
        help="where step-SIZE-DTYPE-DEVICE.json and .md are written",
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    args = parser.parse_args(argv)
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    elif args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda but torch sees no GPU; use --device cpu")
    args.r = args.r or SIZES[args.size].r
    args.methods = list(dict.fromkeys(["frozen", *args.methods]))
    return args


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table and write it beside the figures; returns the exit code."""
    args = parse(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    work = Workload(
        size=SIZES[args.size],
        dtype=DTYPES[args.dtype],
        device=torch.device(args.device),
        seq_len=args.seq_len,
        batch_size=args.batch_size,
        r=args.r,
        checkpointing=args.checkpointing,
    )
    try:
        methods = measure(
            args.methods, work, args.warmup, args.repeats, lambda text: print(text, file=sys.stderr)
        )
    except SpftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    options = {k: v for k, v in vars(args).items() if k not in ("output_dir", "threads")}
    arguments = sys.argv[1:] if argv is None else argv
    report = {
        "command": shlex.join(["python", "benchmarks/step.py", *arguments]),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "options": options,
        "machine": describe_machine(work.device),
        "versions": _versions(),
        "methods": methods,
    }
    page = render(report)
    print(page, end="")
    # A checkpointed run is another experiment; it must not replace the plain one's figures.
    suffix = "-checkpointing" if args.checkpointing else ""
    name = f"step-{args.size}-{args.dtype}-{args.device}{suffix}"
    write_bytes(args.output_dir / f"{name}.json", (json.dumps(report, indent=1) + "\n").encode())
    write_bytes(args.output_dir / f"{name}.md", page.encode())
    return 0


if __name__ == "__main__":
    sys.exit(main())

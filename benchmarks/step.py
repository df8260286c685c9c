"""Times one training step of SPFT, LoRA and full fine-tuning against the frozen model's own pass.

Run `python benchmarks/step.py --help` for the options; benchmarks/README.md says how to read the
table. Weights and tokens are random: a step's cost does not depend on their values.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from measuring import (
    add_options,
    make_report,
    mebibytes,
    positive,
    ratio_figures,
    render_head,
    run_name,
    seconds_figures,
    settle_options,
    spread,
    time_rounds,
    write_report,
)
from memory import peak_bytes_above_start
from peft import LoraConfig, get_peft_model
from torch import nn
from workload import Workload

from trainer_ext import SpftConfig, SpftError, select_neurons
from trainer_ext.report import optimizer_state_bytes
from trainer_ext.tuner.targets import default_target_modules


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
    weights = [*method.model.parameters(), *method.model.buffers()]
    return {
        "note": method.note,
        **seconds_figures(seconds),
        **ratio_figures("ratio_to_frozen", seconds, frozen),
        "trainable_parameters": sum(p.numel() for p in method.trainable),
        "weight_bytes": sum(t.numel() * t.element_size() for t in weights),
        "optimizer_state_bytes": optimizer_state_bytes(method.optimizer) if method.optimizer else 0,
        "step_peak_bytes": step_bytes,
    }


def render(report: dict) -> str:
    """Render the report as a markdown page with one table."""
    lines = [
        *render_head("Step cost", report),
        "| method | s/step | x frozen | trainable | optimizer state | weights | step memory |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in report["methods"].items():
        cells = [
            name + (f" ({row['note']})" if row["note"] else ""),
            spread(row, "{}_seconds", "median_seconds"),
            spread(row, "{}_ratio_to_frozen", "ratio_to_frozen"),
            f"{row['trainable_parameters']:,}",
            mebibytes(row["optimizer_state_bytes"]),
            mebibytes(row["weight_bytes"]),
            mebibytes(row["step_peak_bytes"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options; a wrong one ends the program with a message."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_options(parser, "where step-SIZE-DTYPE-DEVICE.json and .md are written")
    parser.add_argument("--warmup", type=positive, default=2, help="untimed steps of each method")
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        help="what to time; the frozen floor always is",
    )
    args = parser.parse_args(argv)
    settle_options(parser, args)
    args.methods = list(dict.fromkeys(["frozen", *args.methods]))
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table and write it beside the figures; returns the exit code."""
    args = parse(argv)
    work = Workload.of(args)
    try:
        methods = measure(
            args.methods, work, args.warmup, args.repeats, lambda text: print(text, file=sys.stderr)
        )
    except SpftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    arguments = sys.argv[1:] if argv is None else argv
    report = make_report("step.py", arguments, args, methods=methods)
    stem = args.output_dir / run_name("step", args)
    write_report(report, render(report), stem.with_suffix(".json"), stem.with_suffix(".md"))
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Times one training step of SPFT, of other PEFT methods and of full fine-tuning against the floor.

Run `python benchmarks/step.py --help` for the options; benchmarks/README.md says how to read the
table. Weights and tokens are random: a step's cost does not depend on their values.
"""

from __future__ import annotations

import argparse
import gc
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import torch
from measuring import (
    add_options,
    keep_freed_memory,
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
from memory import held_bytes, peak_bytes_above_start
from methods import METHODS, Method, UnavailableError
from picture import Bar, Chart, draw
from workload import Workload

from trainer_ext import SpftError
from trainer_ext.report.figures import optimizer_state_bytes

FLOOR = "frozen"
COMPARED_TIMES = ("lora",)  # ratios to these are in the figures, beside those to the floor
COMPARED_PEAKS = ("lora", "shira")
OUT_OF_MEMORY = "out of memory"

Result = TypeVar("Result")


@dataclass
class Ready:
    """What there is to time, and what there is not.

    Attributes:
        methods: built, warmed up and measured for memory, by their names.
        step_bytes: how far a step of each raises memory.
        without_memory: names of methods that ran out of memory.
        left_out: names of methods that cannot run here -> why.
    """

    methods: dict[str, Method] = field(default_factory=dict)
    step_bytes: dict[str, int] = field(default_factory=dict)
    without_memory: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def prepare(names: list[str], work: Workload, warmup: int, log: Callable[[str], None]) -> Ready:
    """Build the methods, warm them up and take the memory of their steps.

    Raises:
        SpftError: there is not even memory for the floor.
    """
    ready = Ready()
    _build(names, work, warmup, ready, log)
    for name in list(ready.methods):
        log(f"memory of {name}")
        # by its name: a method that is dropped must not live on in a variable of this function
        size = within_memory(
            lambda name=name: peak_bytes_above_start(ready.methods[name].step, work.device)
        )
        if size is None:  # it fitted until the methods after it were there
            del ready.methods[name]
            ready.without_memory.append(name)
            _free()
        else:
            ready.step_bytes[name] = size
    for name in ready.without_memory:
        log(f"{name}: {OUT_OF_MEMORY}")
    if FLOOR in ready.without_memory:
        raise SpftError(
            f"{FLOOR} runs out of memory; lower --batch-size or --seq-len, or add --checkpointing"
        )
    return ready


def _build(
    names: list[str], work: Workload, warmup: int, ready: Ready, log: Callable[[str], None]
) -> None:
    for name in names:
        log(f"building {name}")
        try:
            method = within_memory(lambda name=name: _warmed_up(name, work, warmup))
        except UnavailableError as error:
            ready.left_out[name] = str(error)
            log(f"leaving out {name}: {error}")
            continue
        if method is None:
            ready.without_memory.append(name)
        else:
            ready.methods[name] = method


def _warmed_up(name: str, work: Workload, warmup: int) -> Method:
    method = METHODS[name](work)
    for _ in range(warmup):
        method.step()
    return method


def within_memory(run: Callable[[], Result]) -> Result | None:
    """What `run` returns; None if the device's memory did not suffice."""
    try:
        return run()
    except torch.OutOfMemoryError:
        pass
    _free()  # not before the handler's end: until then the error holds what the step had made
    return None


def _free() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def measure(
    names: list[str],
    work: Workload,
    warmup: int,
    repeats: int,
    log: Callable[[str], None],
    time_limit: float = math.inf,
) -> dict:
    """Take the memory and the times of all methods.

    Returns:
        what the report holds: rounds, trained share, rows by method, what is left out, goals.
    """
    ready = prepare(names, work, warmup, log)
    log(f"timing {repeats} rounds")
    steps = {name: method.step for name, method in ready.methods.items()}
    seconds = time_rounds(steps, repeats, work.device, time_limit=time_limit)
    rows = {}
    for name in names:
        if name in ready.methods:
            rows[name] = {
                **method_figures(ready.methods[name], ready.step_bytes[name]),
                **time_figures(name, seconds),
            }
        elif name in ready.without_memory:
            rows[name] = {"note": "", "out_of_memory": True}
    add_peak_ratios(rows)
    return {
        "rounds": len(seconds[FLOOR]),
        "trained_share_of_linear_weights": work.trained_share,
        "methods": rows,
        "left_out": ready.left_out,
        "goals": goals(rows, work),
    }


def time_figures(name: str, seconds: dict[str, list[float]]) -> dict:
    """Times of a method, and their ratios to others' of the same round."""
    figures = seconds_figures(seconds[name])
    for other in (FLOOR, *COMPARED_TIMES):
        if other in seconds:
            figures |= ratio_figures(f"ratio_to_{other}", seconds[name], seconds[other])
    return figures


def method_figures(method: Method, step_bytes: int) -> dict:
    """What a method trains, and the memory that it needs by itself."""
    weight_bytes = held_bytes(method.model)
    state_bytes = optimizer_state_bytes(method.optimizer) if method.optimizer else 0
    return {
        "note": method.note,
        "trainable_parameters": sum(p.numel() for p in method.trainable),
        "weight_bytes": weight_bytes,
        "optimizer_state_bytes": state_bytes,
        "step_peak_bytes": step_bytes,
        "peak_bytes": weight_bytes + state_bytes + step_bytes,
    }


def add_peak_ratios(rows: dict[str, dict]) -> None:
    """Put the ratios of peak memory to that of other methods into the rows."""
    for other in COMPARED_PEAKS:
        theirs = rows.get(other, {}).get("peak_bytes")
        for row in rows.values():
            if theirs and "peak_bytes" in row:
                row[f"peak_ratio_to_{other}"] = row["peak_bytes"] / theirs


def floor_goal(device: str, share: float) -> float:
    """The goal of a write-through step, in times of the floor's; `share` is of linear weights."""
    return 1.03 if device == "cuda" else 1.03 + share / 2


def goals(rows: dict[str, dict], work: Workload) -> list[dict]:
    """What the write-through step is to reach, and what it has; only what this run can tell."""
    on_gpu = work.device.type == "cuda"
    limits = {
        "ratio_to_frozen": floor_goal(work.device.type, work.trained_share),
        "ratio_to_lora": 0.75 if on_gpu else 1.0,
        "peak_ratio_to_shira": 0.80,
    }
    if on_gpu and not work.checkpointing:
        limits["peak_ratio_to_lora"] = 0.80
    row = rows.get("spft_write_through", {})
    return [
        {"figure": key, "at_most": limit, "measured": row[key], "met": row[key] <= limit}
        for key, limit in limits.items()
        if key in row
    ]


def render(report: dict) -> str:
    """Render the report as a markdown page with one table."""
    lines = render_head("Step cost", report)
    share, device = report["trained_share_of_linear_weights"], report["options"]["device"]
    # the head ends with an empty line
    lines[-1:] = [
        f"- SPFT trains p = {share:.1%} of the linear layers' weights, the other PEFT methods as "
        "nearly as many as their rank allows",
        f"- goal of `spft_write_through`: at most {floor_goal(device, share):.3f} x frozen"
        + ("" if device == "cuda" else " (1.03 + p/2)"),
        *(f"- left out: {name} ({why})" for name, why in report["left_out"].items()),
        "",
        "| method | s/step | x frozen | trainable | weights | optimizer state | step memory "
        "| peak memory |",
        "|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for name, row in report["methods"].items():
        lines.append(f"| {' | '.join(_cells(name, row))} |")
    if report["goals"]:
        lines += ["", "`spft_write_through` against its goals:", ""]
        lines += [
            f"- {_in_words(goal['figure'])}: {goal['measured']:.3f}, goal at most "
            f"{goal['at_most']:.3f}: {'met' if goal['met'] else 'missed'}"
            for goal in report["goals"]
        ]
    return "\n".join([*lines, "", "![the table as bars](picture.svg)"]) + "\n"


def _cells(name: str, row: dict) -> list[str]:
    if "out_of_memory" in row:
        return [name, OUT_OF_MEMORY, *[""] * 6]
    sizes = ("weight_bytes", "optimizer_state_bytes", "step_peak_bytes", "peak_bytes")
    return [
        name + (f" ({row['note']})" if row["note"] else ""),
        spread(row, "{}_seconds", "median_seconds"),
        spread(row, "{}_ratio_to_frozen", "ratio_to_frozen"),
        f"{row['trainable_parameters']:,}",
        *(mebibytes(row[key]) for key in sizes),
    ]


def _in_words(figure: str) -> str:
    measure_, _, other = figure.partition("_to_")
    return f"x {other}'s peak memory" if measure_ == "peak_ratio" else f"x {other}'s time"


def picture(report: dict) -> str:
    """The table's ratios to the floor and its peak memory as bars."""
    times, peaks = [], []
    largest = max(row.get("peak_bytes", 0) for row in report["methods"].values())
    unit, unit_bytes = ("GiB", 2**30) if largest >= 2**30 else ("MiB", 2**20)
    for name, row in report["methods"].items():
        own = name.startswith("spft")
        if "out_of_memory" in row:
            times.append(Bar(name, None, OUT_OF_MEMORY))
            peaks.append(Bar(name, None, OUT_OF_MEMORY))
            continue
        ratio = row["ratio_to_frozen"]
        span = (row["min_ratio_to_frozen"], row["max_ratio_to_frozen"])
        times.append(Bar(name, ratio, f"{ratio:.2f}", span, own))
        peak = row["peak_bytes"] / unit_bytes
        peaks.append(Bar(name, peak, f"{peak:.2f} {unit}", own=own))
    options = report["options"]
    return draw(
        f"Cost of a training step: {options['size']}, {options['dtype']}, {options['device']}, "
        f"{options['batch_size']} x {options['seq_len']} tokens",
        [
            Chart("time of a step, x frozen (median; whisker: min to max)", times, mark=1.0),
            Chart(f"peak memory, {unit} (weights + optimizer state + step)", peaks),
        ],
    )


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options; a wrong one ends the program with a message."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_options(
        parser, "where step-SIZE-DTYPE-DEVICE/table.md, figures.json and picture.svg are written"
    )
    parser.add_argument("--compile", action="store_true", help="run models under torch.compile")
    parser.add_argument("--warmup", type=positive, default=2, help="untimed steps of each method")
    parser.add_argument(
        "--time-limit",
        type=positive,
        help="begin no further round after so many seconds of timing; none if unset",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=METHODS,
        default=list(METHODS),
        help="what to time; the frozen floor always is",
    )
    args = parser.parse_args(argv)
    settle_options(parser, args)
    args.methods = [name for name in METHODS if name in (FLOOR, *args.methods)]
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table and write it beside the figures; returns the exit code."""
    args = parse(argv)
    try:
        measured = measure(
            args.methods,
            Workload.of(args, compile=args.compile),
            args.warmup,
            args.repeats,
            lambda text: print(text, file=sys.stderr),
            args.time_limit or math.inf,
        )
    except SpftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    arguments = sys.argv[1:] if argv is None else argv
    report = make_report("step.py", arguments, args, **measured)
    folder = args.output_dir / run_name("step", args)
    write_report(report, render(report), folder, picture(report))
    return 0


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())

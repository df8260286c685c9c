"""Says operator by operator where a method's training step spends more time than the floor's.

Run `python benchmarks/step_profile.py --help` for the options; benchmarks/README.md says how to
read the table.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections import defaultdict
from collections.abc import Callable

import torch
from measuring import (
    add_options,
    keep_freed_memory,
    make_report,
    positive,
    render_head,
    run_name,
    settle_options,
    synchronize,
    time_once,
    write_report,
)
from methods import METHODS, Method, UnavailableError
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function
from workload import Workload

from trainer_ext import SpftError

FLOOR = "frozen"
METHOD = "spft_write_through"
PART = "of it"  # begins the names of phases that are parts of the one before them
STEP = "outside operators"  # the range around a step: its own time is Python's

Operators = dict[str, tuple[float, int]]  # name -> (milliseconds, calls)


def phase_times(method: Method, device: torch.device) -> dict[str, float]:
    """Milliseconds of each phase of one step, without a profiler; the device is waited for.

    Parts that the method names are run once more after the step.
    """
    loss = []
    runs = {
        "forward": lambda: loss.append(method.forward()),
        "backward": lambda: method.backward(loss.pop()),
        "optimizer": method.update,
        **{f"{PART} {name}": run for name, run in method.parts.items()},
    }
    return {phase: 1e3 * time_once(run, device) for phase, run in runs.items()}


def operator_times(method: Method, device: torch.device) -> Operators:
    """Self time of each operator in one step.

    On CUDA an operator's time is that of the kernels it starts. Kernels that no operator is known
    to have started are one line.
    """
    on_gpu = device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    synchronize(device)
    with profile(activities=activities) as profiler:
        with record_function(STEP):
            method.step()
        synchronize(device)
    operators = {}
    of_kernels = of_operators = 0.0
    for event in profiler.key_averages():
        own = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e3
        if event.device_type == DeviceType.CPU:
            operators[event.key] = (own, event.count)
            of_operators += own
        elif not event.is_user_annotation:  # the shadow of a range on the device
            of_kernels += own
    if of_kernels > of_operators:
        operators["kernels of no known operator"] = (of_kernels - of_operators, 0)
    return {name: figures for name, figures in operators.items() if figures[0]}


def measure(
    name: str, work: Workload, warmup: int, repeats: int, log: Callable[[str], None]
) -> dict:
    """Profile the floor and a method in turn; returns what the report holds, medians of repeats.

    Raises:
        UnavailableError: the method cannot run on this machine.
    """
    names = (FLOOR, name)
    methods = {}
    for each in names:
        log(f"building {each}")
        methods[each] = METHODS[each](work)
        for _ in range(warmup):
            methods[each].step()
        operator_times(methods[each], work.device)  # the profiler's own first time is slow
    phases, operators = ({each: [] for each in names} for _ in range(2))
    log(f"{repeats} rounds")
    for round_ in range(repeats):
        for each in names if round_ % 2 == 0 else reversed(names):
            phases[each].append(phase_times(methods[each], work.device))
            operators[each].append(operator_times(methods[each], work.device))

    def middle(phase: str, each: str) -> float:
        # the floor has none of a method's own parts
        return statistics.median(times.get(phase, 0.0) for times in phases[each])

    return {
        "method": name,
        "note": methods[name].note,
        "phases": [
            {"phase": phase, "floor_ms": middle(phase, FLOOR), "method_ms": middle(phase, name)}
            for phase in phases[name][0]
        ],
        "operators": differences(*(medians(operators[each]) for each in names)),
    }


def medians(repeats: list[Operators]) -> Operators:
    """Median time and calls of each operator over the repeats; one that is absent takes no time."""
    names = dict.fromkeys(name for of_repeat in repeats for name in of_repeat)
    columns = {name: [of_repeat.get(name, (0.0, 0)) for of_repeat in repeats] for name in names}
    return {
        name: (
            statistics.median(t for t, _ in column),
            statistics.median_high(c for _, c in column),
        )
        for name, column in columns.items()
    }


def differences(floor: Operators, method: Operators) -> list[dict]:
    """A row for each operator of either, the largest absolute difference of time first."""
    absent = (0.0, 0)
    rows = []
    for name in dict.fromkeys((*method, *floor)):
        (floor_ms, floor_calls), (method_ms, calls) = (
            floor.get(name, absent),
            method.get(name, absent),
        )
        rows.append(
            {
                "operator": name,
                "floor_ms": floor_ms,
                "method_ms": method_ms,
                "difference_ms": method_ms - floor_ms,
                "floor_calls": floor_calls,
                "method_calls": calls,
            }
        )
    return sorted(rows, key=lambda row: -abs(row["difference_ms"]))


def summed(name: str, rows: list[dict]) -> dict:
    """One row for several."""
    sums: dict = defaultdict(float)
    for row in rows:
        for key, value in row.items():
            if key != "operator":
                sums[key] += value
    return {"operator": name, **sums}


def render(report: dict, top: int) -> str:
    """Render the report as a markdown page with a table of phases and one of operators."""
    method = report["method"] + (f" ({report['note']})" if report["note"] else "")
    operators = report["operators"]
    shown, rest = operators[:top], operators[top:]
    lines = [
        *render_head(f"Where {method} spends more than {FLOOR}", report, "median"),
        f"| phase | {FLOOR}, ms | method, ms | difference |",
        "|---|--:|--:|--:|",
    ]
    phases = report["phases"]
    for row in phases:
        lines.append(_phase_line(row["phase"], row["floor_ms"], row["method_ms"]))
    whole = [row for row in phases if not row["phase"].startswith(PART)]
    sums = (sum(row[key] for row in whole) for key in ("floor_ms", "method_ms"))
    lines.append(_phase_line("**step**", *sums))
    lines += [
        "",
        f"| operator | {FLOOR}, ms | method, ms | difference | calls of {FLOOR} | of method |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for row in shown:
        lines.append(_operator_line(row))
    if rest:
        lines.append(_operator_line(summed(f"the other {len(rest)}", rest)))
    lines.append(_operator_line(summed("**all**", operators)))
    return "\n".join(lines) + "\n"


def _phase_line(name: str, floor: float, method: float) -> str:
    return f"| {name} | {floor:,.3f} | {method:,.3f} | {method - floor:+,.3f} |"


def _operator_line(row: dict) -> str:
    name = row["operator"].replace("|", "\\|")
    times = f"{row['floor_ms']:,.3f} | {row['method_ms']:,.3f} | {row['difference_ms']:+,.3f}"
    calls = f"{row['floor_calls']:.0f} | {row['method_calls']:.0f}"
    return f"| {name} | {times} | {calls} |"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options; a wrong one ends the program with a message."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_options(parser, "where step-profile-SIZE-DTYPE-DEVICE/table.md, figures.json are written")
    parser.add_argument("--warmup", type=positive, default=2, help="unmeasured steps of each")
    parser.add_argument("--top", type=positive, default=25, help="operators that get a line")
    parser.add_argument(
        "--method",
        choices=[name for name in METHODS if name != FLOOR],
        default=METHOD,
        help="what to hold against the floor",
    )
    args = parser.parse_args(argv)
    settle_options(parser, args)
    return args


def main(argv: list[str] | None = None) -> int:
    """Profile, print the tables and write them beside the figures; returns the exit code."""
    args = parse(argv)
    try:
        measured = measure(
            args.method,
            Workload.of(args),
            args.warmup,
            args.repeats,
            lambda text: print(text, file=sys.stderr),
        )
    except (SpftError, UnavailableError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    arguments = sys.argv[1:] if argv is None else argv
    report = make_report("step_profile.py", arguments, args, **measured)
    suffix = "" if args.method == METHOD else f"-{args.method}"
    folder = args.output_dir / (run_name("step-profile", args) + suffix)
    write_report(report, render(report, args.top), folder)
    return 0


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())

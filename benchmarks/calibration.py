"""Times a calibration batch of each importance metric against a backward through the frozen model.

Run `python benchmarks/calibration.py --help` for the options; benchmarks/README.md says how to read
the table. Weights and tokens are random: the cost does not depend on their values.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import count

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
    time_once,
    time_rounds,
    write_report,
)
from memory import peak_bytes_above_start
from peft import get_peft_model
from workload import Workload

from trainer_ext import SpftConfig, SpftError
from trainer_ext.calibration.mode import calibration_mode
from trainer_ext.config.registry import METRICS
from trainer_ext.importance.base import CalibrationBatch
from trainer_ext.importance.class_column import CLASS_KEY, RowClasses
from trainer_ext.importance.noise import chunk_rows
from trainer_ext.tuner.model import spft_layers

CLASSES = 4  # of quantile_mean's rows
PEAK_BATCHES = 2  # one for each half of the data


class Subject:
    """The model with an unselected adapter, and the batch that all rows of the table run.

    Attributes:
        layers: layer name -> layer, those that are scored.
        directions: random directions of zo_taylor for each batch.
    """

    def __init__(self, work: Workload, directions: int) -> None:
        self.work, self.directions = work, directions
        self.model = get_peft_model(work.base_model(), SpftConfig(r=work.r))
        self.layers = spft_layers(self.model, "default")
        self._batch = work.batch()
        self._calls = count()

    def run_batch(self, backward: bool) -> torch.Tensor:
        """Run the batch's loss, with `backward` also its backward; returns the loss."""
        with self.work.autocast():
            loss = self.model(**self._batch).loss
        if backward:
            loss.backward()
        return loss.detach()

    def run_batch_of_classes(self, backward: bool) -> torch.Tensor:
        """As `run_batch`, with a class for every row; it changes from call to call, so that one
        row a batch will do."""
        rows = torch.arange(self.work.batch_size, device=self.work.device)
        self._batch[CLASS_KEY] = (rows + next(self._calls)) % CLASSES
        try:
            return self.run_batch(backward)
        finally:
            del self._batch[CLASS_KEY]

    def config(self, importance: str, **changes) -> SpftConfig:
        """The configuration of a calibration by one metric."""
        options = {"r": self.work.r, "zo_directions": self.directions, "class_field": "class"}
        return SpftConfig(importance=importance, **options | changes)


class Row:
    """One line of the table: what a round runs.

    Attributes:
        parts: rows that make up what this one cannot do without; its ratio is to their sum.
        note: what the table says beside its name.
        per_batch: whether `step` is to be timed at all.
    """

    parts: tuple[str, ...] = ()
    note = ""
    per_batch = True

    def __init__(self, subject: Subject) -> None:
        self.subject = subject

    def around(self) -> AbstractContextManager:
        """What must be in place while `step` runs; without gradients by default."""
        return calibration_mode(self.subject.model, self.subject.layers, gradients=False)

    def step(self) -> None:
        """The work of one batch."""
        raise NotImplementedError


class Frozen(Row):
    """Forward and backward to the embeddings' output, as any backward through the model must."""

    def around(self):
        return calibration_mode(self.subject.model, self.subject.layers, gradients=True)

    def step(self):
        self.subject.run_batch(True)


class Forwards(Row):
    """Forwards that keep nothing for a backward: one, or as many as zo_taylor makes a batch."""

    def __init__(self, subject: Subject, times: int = 1) -> None:
        super().__init__(subject)
        self.times = times
        self.note = f"x {times}"

    def step(self):
        for _ in range(self.times):
            self.subject.run_batch(False)


class Noise(Row):
    """The noise of all layers, chunk by chunk as zo_taylor makes it, several times."""

    def __init__(self, subject: Subject, times: int) -> None:
        super().__init__(subject)
        self.times = times
        self.note = f"x {times}"
        self.metric = METRICS["zo_taylor"](
            subject.layers, subject.config("zo_taylor"), subject.model
        )

    def step(self):
        for direction in range(self.times):
            for name, layer in self.subject.layers.items():
                rows, columns = layer.get_base_layer().weight.shape
                for chunk in range(math.ceil(rows / chunk_rows(columns))):
                    self.metric.noise(0, direction, name, chunk)


class Metric(Row):
    """One calibration by one metric.

    Args:
        changes: to the default configuration.
    """

    def __init__(
        self,
        subject: Subject,
        importance: str,
        parts: tuple[str, ...] = (),
        note: str = "",
        **changes,
    ) -> None:
        super().__init__(subject)
        self.parts, self.note = parts, note
        config = subject.config(importance, **changes)
        self.metric = METRICS[importance](subject.layers, config, subject.model)
        self.per_batch = self.metric.needs_data
        with_classes = importance == "quantile_mean"
        self._run_batch = subject.run_batch_of_classes if with_classes else subject.run_batch
        self.metric.begin_pass(list(subject.layers))

    @contextmanager
    def around(self):
        subject, metric = self.subject, self.metric
        with (
            calibration_mode(subject.model, subject.layers, metric.needs_gradients),
            RowClasses.installed(subject.model) as metric.row_classes,
            metric.attached(list(subject.layers)),
        ):
            yield

    def step(self):
        self.metric.observe(CalibrationBatch(self._run_batch))

    def end(self) -> None:
        """What comes once, after the last batch."""
        if self.per_batch:
            self.metric.end_pass()
        self.metric.scores()


# A row is one function here.
ROWS: dict[str, Callable[[Subject], Row]] = {
    "frozen": Frozen,
    "forward": Forwards,
    "zo_forwards": lambda subject: Forwards(subject, 2 * subject.directions),
    "zo_noise": lambda subject: Noise(subject, 2 * subject.directions),
    "zo_scoring_noise": lambda subject: Noise(subject, subject.directions),
    "group_taylor": lambda subject: Metric(subject, "group_taylor", ("frozen",)),
    "quantile_mean": lambda subject: Metric(
        subject, "quantile_mean", ("frozen",), f"{CLASSES} classes"
    ),
    "taylor": lambda subject: Metric(subject, "taylor", ("frozen",)),
    "taylor_one_sum": lambda subject: Metric(
        subject, "taylor", ("frozen",), "stability off", stability=False
    ),
    "zo_taylor": lambda subject: Metric(subject, "zo_taylor", ("zo_forwards", "zo_noise")),
    "wanda": lambda subject: Metric(subject, "wanda", ("forward",)),
    "magnitude": lambda subject: Metric(subject, "magnitude"),
    "random": lambda subject: Metric(subject, "random"),
}
# Rows that are measured beside a row, its parts among them; the frozen pass always is.
BESIDE = {
    "wanda": ("forward",),
    "zo_taylor": ("zo_forwards", "zo_noise", "zo_scoring_noise"),
}


def measure(
    names: list[str], subject: Subject, warmup: int, repeats: int, log: Callable[[str], None]
) -> dict[str, dict]:
    """Take the memory of all rows, warm them up, then time their batches and their ends."""
    device = subject.work.device
    _run_batches(Frozen(subject), 1)  # what libraries allocate once is nobody's peak
    peak_bytes = {}
    for name in names:
        log(f"memory of {name}")
        peak_bytes[name] = peak_bytes_above_start(partial(_run_whole, name, subject), device)
    rows = {name: ROWS[name](subject) for name in names}
    log("warming up")
    timed = {name: row for name, row in rows.items() if row.per_batch}
    for row in timed.values():
        _run_batches(row, warmup)
    log(f"timing {repeats} rounds")
    seconds = time_rounds(
        {name: row.step for name, row in timed.items()},
        repeats,
        device,
        around=lambda name: timed[name].around(),
    )
    log("timing the ends")
    return {
        name: {
            "note": row.note,
            **batch_figures(name, row.parts, seconds),
            **(_end_figures(row, repeats, device) if isinstance(row, Metric) else {}),
            "peak_bytes": peak_bytes[name],
        }
        for name, row in rows.items()
    }


def batch_figures(name: str, parts: tuple[str, ...], seconds: dict[str, list[float]]) -> dict:
    """Times of a batch, and their ratios to the frozen pass and to the parts of the same round.

    Args:
        seconds: row name -> its time in each round; a row without is not timed by batch.
    """
    if name not in seconds:
        return {}
    figures = seconds_figures(seconds[name])
    figures |= ratio_figures("ratio_to_frozen", seconds[name], seconds["frozen"])
    if parts:
        sums = [sum(of_round) for of_round in zip(*(seconds[p] for p in parts), strict=True)]
        figures["parts"] = list(parts)
        figures |= ratio_figures("ratio_to_parts", seconds[name], sums)
    return figures


def _end_figures(row: Metric, repeats: int, device: torch.device) -> dict:
    # A metric that needs data drops its sums at its end, so that can be timed only once.
    times = 1 if row.per_batch else repeats
    milliseconds = [1e3 * time_once(row.end, device) for _ in range(times)]
    return {
        "batches": sum(row.metric.batches),
        "end_ms": statistics.median(milliseconds),
        "min_end_ms": min(milliseconds),
        "max_end_ms": max(milliseconds),
    }


def _run_batches(row: Row, times: int) -> None:
    with row.around():
        for _ in range(times):
            row.step()


def _run_whole(name: str, subject: Subject) -> None:
    """A row from its making to its scores."""
    row = ROWS[name](subject)
    if row.per_batch:
        _run_batches(row, PEAK_BATCHES)
    if isinstance(row, Metric):
        row.end()


def render(report: dict) -> str:
    """Render the report as a markdown page with one table."""
    lines = [
        *render_head("Calibration cost", report),
        "| row | s/batch | x frozen | x its parts | parts | end, ms | peak memory |",
        "|---|--:|--:|--:|---|--:|--:|",
    ]
    for name, row in report["rows"].items():
        parts = row.get("parts")
        cells = [
            name + (f" ({row['note']})" if row["note"] else ""),
            spread(row, "{}_seconds", "median_seconds") if "seconds" in row else "",
            spread(row, "{}_ratio_to_frozen", "ratio_to_frozen") if "seconds" in row else "",
            spread(row, "{}_ratio_to_parts", "ratio_to_parts") if parts else "",
            " + ".join(parts or ()),
            _end_cell(row),
            mebibytes(row["peak_bytes"]),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _end_cell(row: dict) -> str:
    if "end_ms" not in row:
        return ""
    batches = f" after {row['batches']} batches" if row["batches"] else ""
    return f"{row['end_ms']:,.1f}{batches}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Read the options; a wrong one ends the program with a message."""
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add_options(parser, "where calibration-SIZE-DTYPE-DEVICE/figures.json and table.md are written")
    parser.add_argument("--warmup", type=positive, default=1, help="untimed batches of each row")
    parser.add_argument(
        "--zo-directions",
        type=positive,
        default=SpftConfig.zo_directions,
        help="random directions of zo_taylor for each batch",
    )
    parser.add_argument(
        "--rows",
        nargs="+",
        choices=ROWS,
        default=list(ROWS),
        help="what to time; what it is compared with always is",
    )
    args = parser.parse_args(argv)
    settle_options(parser, args)
    wanted = {"frozen", *args.rows, *(n for row in args.rows for n in BESIDE.get(row, ()))}
    args.rows = [name for name in ROWS if name in wanted]
    return args


def main(argv: list[str] | None = None) -> int:
    """Measure, print the table and write it beside the figures; returns the exit code."""
    args = parse(argv)
    try:
        subject = Subject(Workload.of(args), args.zo_directions)
        rows = measure(
            args.rows, subject, args.warmup, args.repeats, lambda text: print(text, file=sys.stderr)
        )
    except SpftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    arguments = sys.argv[1:] if argv is None else argv
    report = make_report("calibration.py", arguments, args, rows=rows)
    folder = args.output_dir / run_name("calibration", args)
    write_report(report, render(report), folder)
    return 0


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())

"""Invariants of benchmarks/quality.py, on a tiny model with a byte tokenizer:

- Every case trains as many parameters as the others, to rounding, lowers the held-out loss and
  gives one row. A command that is given again runs what is missing; of a killed one's rows only
  the half-written line is lost.
- Rows of other code, other options or another device are refused, and named.
- The committed tables are those of the committed rows.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import quality
import quality_table
from tiny_models import byte_tokenizer, tiny_model

RESULTS = Path(quality.__file__).parent / "results"
COMMITTED = sorted(RESULTS.glob("**/quality*/rows.jsonl"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model and data as the quickstart makes them, but tiny."""
    folder = tmp_path_factory.mktemp("quality")
    tiny_model().save_pretrained(folder / "model")
    byte_tokenizer().save_pretrained(folder / "model")
    (folder / "data").mkdir()
    for name, count in (("train.jsonl", 24), ("held_out.jsonl", 6)):
        rows = [
            {
                "messages": [
                    {"role": "user", "content": f"q{i}"},
                    {"role": "assistant", "content": "the same answer"},
                ],
                "module": f"m{i % 2}",
            }
            for i in range(count)
        ]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "data" / name).write_text(text)
    return folder


@pytest.fixture
def call(folders, tmp_path, monkeypatch, capsys):
    """Return a function that runs the script; it returns the exit code and what was printed."""
    monkeypatch.setattr(quality, "R", 8)

    def call_(*arguments: str):
        given = ["--model", folders / "model", "--data", folders / "data"]
        given += ["--output-dir", tmp_path, "--max-steps", 8, "--calibration-batches", 2]
        code = quality.main([*map(str, given), *arguments])
        return code, capsys.readouterr()

    return call_


def rows_in(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_every_case_trains_and_is_a_row(call, tmp_path):
    code, printed = call("--learning-rates", "1e-2")
    assert code == 0
    rows = rows_in(tmp_path)
    assert [row["case"] for row in rows] == list(quality.CASES)
    counts = [row["trainable_parameters"] for row in rows]
    assert max(counts) <= 1.1 * min(counts)
    for row in rows:
        assert row["held_out_loss_after"] < row["held_out_loss_before"] - 0.1, row["case"]
    assert len({row["held_out_loss_after"] for row in rows}) == len(rows)
    assert printed.out.splitlines()[-1].endswith("; 0 runs left")
    assert (tmp_path / "table.md").read_text() == quality_table.render(rows)


def test_a_call_goes_on_where_the_last_was_killed(call, tmp_path, monkeypatch):
    cases = ("--cases", "random", "magnitude")
    assert call(*cases, "--seeds", "1")[0] == 0
    path = tmp_path / "rows.jsonl"
    whole = path.read_text()
    half = whole.splitlines()[0]
    path.write_text(whole + half[: half.rindex("}")])  # killed while it wrote
    begun = []
    run = quality.Bench.run
    monkeypatch.setattr(quality.Bench, "run", lambda self, job: begun.append(job) or run(self, job))
    assert call(*cases, "--seeds", "1", "2")[0] == 0
    assert [(job.case, job.seed) for job in begun] == [("random", 2), ("magnitude", 2)]
    assert path.read_text().startswith(whole)
    assert len(rows_in(tmp_path)) == 4


def test_no_run_begins_after_the_time_limit(call, tmp_path, monkeypatch):
    times = iter([0.0, 5.0, 11.0])  # the call's start, and before each run
    monkeypatch.setattr(quality.time, "monotonic", lambda: next(times, 11.0))
    code, printed = call("--cases", "random", "magnitude", "--time-limit", "10")
    assert code == 1
    assert printed.out.splitlines()[-1].endswith("; 1 runs left")
    assert [row["case"] for row in rows_in(tmp_path)] == ["random"]


class _AtOnce(ThreadPoolExecutor):
    """In the place of a pool of processes; notes how many jobs it held at most."""

    most = 0

    def __init__(self, workers, context, start, arguments):
        super().__init__(workers)
        start(*arguments)

    def submit(self, *call):
        _AtOnce.most = max(_AtOnce.most, self._work_queue.qsize() + 1)
        return super().submit(*call)


@pytest.fixture
def pool(monkeypatch, tmp_path):
    """Return a function that runs four jobs on two workers; it returns the rows."""
    args = argparse.Namespace(workers=2, cases=[])
    jobs = [quality.Job("random", seed, 1e-3) for seed in range(4)]

    def run(run_job, deadline: float):
        monkeypatch.setattr(quality, "ProcessPoolExecutor", _AtOnce)
        monkeypatch.setattr(quality, "_start_worker", lambda *arguments: None)
        monkeypatch.setattr(quality, "_run_in_worker", run_job)
        return list(quality.run_all(jobs, args, None, deadline))

    return run


def test_workers_begin_nothing_after_the_time_limit(pool, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(quality.time, "monotonic", lambda: clock[0])

    def run_job(job):
        clock[0] += 6.0
        return job.seed

    rows = pool(run_job, deadline=10.0)
    assert set(rows) >= {0, 1}
    assert len(rows) <= 3  # the two that began at once, and one that may have begun before 10
    assert _AtOnce.most <= 2
    clock[0] = 0.0
    assert sorted(pool(lambda job: job.seed, deadline=10.0)) == [0, 1, 2, 3]


def test_a_worker_that_raises_ends_the_rest(pool):
    begun = []

    def run_job(job):
        begun.append(job.seed)
        raise MemoryError("no more")

    with pytest.raises(MemoryError, match="no more"):
        pool(run_job, deadline=math.inf)
    assert set(begun) <= {0, 1}


@pytest.mark.parametrize(
    ("key", "value"),
    [("code", "0" * 12), ("inputs", "1" * 12), ("max_steps", 9), ("device", "another GPU")],
)
def test_rows_of_another_setting_are_refused(call, tmp_path, key, value):
    assert call("--cases", "random")[0] == 0
    row = rows_in(tmp_path)[0]
    row["setting"][key] = value
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    code, printed = call("--cases", "random")
    assert code == 1
    assert f"has rows with {key} = {value}, this call has " in printed.err
    assert rows_in(tmp_path) == [row]


def test_a_missing_model_is_told(tmp_path, capsys):
    with pytest.raises(SystemExit):
        quality.parse(["--model", str(tmp_path / "nothing")])
    assert "nothing is not there; run make quickstart first" in capsys.readouterr().err


@pytest.mark.parametrize("rows", COMMITTED, ids=lambda path: path.parts[-3])
def test_the_committed_table_is_that_of_its_rows(rows, tmp_path):
    shutil.copy(rows, tmp_path)
    assert rows.with_name("table.md").read_text() == quality_table.render(rows_in(tmp_path))


def test_the_table_shows_each_cell_and_the_best_rate():
    def row(case, seed, rate, loss):
        setting = {"max_steps": 3, "rows": 2, "device": "cpu"}
        versions = {"torch": "1", "transformers": "2", "peft": "3"}
        losses = {"held_out_loss_before": 4.0, "held_out_loss_after": loss}
        more = {"trainable_parameters": 1000, "agreement_of_halves": None}
        return {
            "case": case,
            "seed": seed,
            "learning_rate": rate,
            "setting": setting,
            "versions": versions,
            **losses,
            **more,
        }

    rows = [row("b", 1, 1e-3, 3.0), row("a", 1, 1e-3, 2.0), row("a", 2, 1e-3, 2.5)]
    rows.append(row("a", 1, 3e-3, 2.75))
    table = quality_table.render(rows).splitlines()
    assert table[2].startswith("| case | rate 0.001 | rate 0.003 |")
    assert table[4] == "| a | **2.250 (2.000, 2.500)** | 2.750 | 1,000 |  |"
    assert table[5] == "| b | **3.000** |  | 1,000 |  |"

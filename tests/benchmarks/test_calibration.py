"""Invariants of benchmarks/calibration.py (none about time):

- One command measures every row, prints the table and writes it and the figures, with the command,
  options, machine and versions; nothing else is left in the folder.
- Metrics that need data are timed by batch, and those that need none only at their end.
- Ratios are of times of the same round; a row's parts are summed within their round.
- All batches of a row come after one another in one calibration, and every metric ends with finite
  scores of every layer.
- The frozen pass goes down to the embeddings' output with nothing trainable; the others keep no
  graph; zo_taylor's parts make as many forwards and as much noise as zo_taylor itself.
- taylor's accumulators are in its peak, twice with stability.
- What a row is compared with is always measured beside it.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import calibration
import measuring
import pytest
import torch
import workload

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}
ENVIRONMENT["PYTHONPATH"] = str(BENCHMARKS.parent)
WITHOUT_DATA = ["magnitude", "random"]


@pytest.fixture(params=["fp32", "bf16", "fp32-checkpointing"])
def subject(request):
    return make_subject(*request.param.split("-"))


def make_subject(dtype: str = "fp32", checkpointing: str = "", batch_size: int = 2):
    work = workload.Workload(
        size=workload.SIZES["tiny"],
        dtype=workload.DTYPES[dtype],
        device=torch.device("cpu"),
        seq_len=16,
        batch_size=batch_size,
        r=8,
        checkpointing=bool(checkpointing),
    )
    return calibration.Subject(work, directions=2)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder, output and arguments of one run of the script."""
    folder = tmp_path_factory.mktemp("benchmark") / "results"
    options = {"size": "tiny", "repeats": 2, "seq-len": 16, "batch-size": 2, "zo-directions": 2}
    options |= {"device": "cpu", "output-dir": folder}
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, str(BENCHMARKS / "calibration.py"), *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, arguments


def test_the_run_writes_the_table_it_prints_and_the_figures(run):
    folder, output, arguments = run
    assert os.listdir(folder) == ["calibration-tiny-fp32-cpu"]
    folder = folder / "calibration-tiny-fp32-cpu"
    assert sorted(os.listdir(folder)) == ["figures.json", "table.md"]
    assert (folder / "table.md").read_text() == output
    report = json.loads((folder / "figures.json").read_text())
    assert report["command"].split() == ["python", "benchmarks/calibration.py", *arguments]
    assert report["options"]["repeats"] == 2
    assert report["options"]["zo_directions"] == 2
    assert report["machine"]["cpu"]
    assert set(report["versions"]) == {"python", *measuring.PACKAGES}
    assert report["date"].startswith("20")
    table = [line for line in output.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert [row.split()[1] for row in table[2:]] == list(calibration.ROWS)


def test_the_figures_of_every_row_fit_together(run):
    rows = json.loads((run[0] / "calibration-tiny-fp32-cpu" / "figures.json").read_text())["rows"]
    assert list(rows) == list(calibration.ROWS)
    metrics = ["group_taylor", "quantile_mean", "taylor", "taylor_one_sum", "zo_taylor", "wanda"]
    for name, row in rows.items():
        assert ("seconds" in row) == (name not in WITHOUT_DATA)
        assert ("end_ms" in row) == (name in [*metrics, *WITHOUT_DATA])
        assert row["peak_bytes"] > 0
    for name in set(rows) - set(WITHOUT_DATA):
        row = rows[name]
        assert len(row["seconds"]) == 2
        assert row["min_seconds"] <= row["median_seconds"] <= row["max_seconds"]
        for key, floor in (("frozen", ["frozen"]), ("parts", row.get("parts", []))):
            ratios = [
                row["seconds"][i] / sum(rows[part]["seconds"][i] for part in floor)
                for i in range(2)
                if floor
            ]
            if ratios:
                assert row[f"min_ratio_to_{key}"] == pytest.approx(min(ratios))
                assert row[f"max_ratio_to_{key}"] == pytest.approx(max(ratios))
    assert all(rows[name]["batches"] == 3 for name in metrics)  # one of them to warm up


def test_ratios_are_taken_within_a_round():
    # Each round is another machine; ratios of medians would be 1.5 and 0.5.
    seconds = {"frozen": [1.0, 10.0, 2.0], "a": [2.0, 30.0, 3.0], "b": [1.0, 10.0, 3.0]}
    seconds["zo"] = [6.0, 20.0, 3.0]
    figures = calibration.batch_figures("a", ("frozen",), seconds)
    assert figures["ratio_to_frozen"] == figures["ratio_to_parts"] == 2.0
    figures = calibration.batch_figures("zo", ("a", "b"), seconds)
    assert (figures["min_ratio_to_parts"], figures["max_ratio_to_parts"]) == (0.5, 2.0)
    assert figures["ratio_to_parts"] == 0.5
    assert figures["parts"] == ["a", "b"]


@pytest.mark.parametrize("name", list(calibration.ROWS))
def test_every_row_runs_interrupted_by_others(subject, name):
    row, other = calibration.ROWS[name](subject), calibration.Frozen(subject)
    if not row.per_batch:
        assert name in WITHOUT_DATA
    for _ in range(2 * row.per_batch):
        calibration._run_batches(row, 1)
        calibration._run_batches(other, 1)
    if isinstance(row, calibration.Metric):
        row.end()
        scores = row.metric.scores()
        assert list(scores) == list(subject.layers)
        assert all(bool(s.isfinite().all()) for s in scores.values())
        assert sum(row.metric.batches) == 2 * row.per_batch
    assert not any(p.grad is not None for p in subject.model.parameters())


def test_interruptions_do_not_change_the_scores():
    subject = make_subject()
    scores = []
    for interrupted in (False, True):
        row = calibration.ROWS["group_taylor"](subject)
        for _ in range(2):
            calibration._run_batches(row, 1)
            if interrupted:
                calibration._run_batches(calibration.ROWS["taylor"](subject), 1)
        row.end()
        scores.append(row.metric.scores())
    assert all(torch.equal(scores[0][name], scores[1][name]) for name in subject.layers)


def test_the_frozen_pass_reaches_the_embeddings_and_the_forward_keeps_nothing(subject):
    outputs = []
    subject.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: outputs.append(output)
    )
    frozen, forward = calibration.Frozen(subject), calibration.Forwards(subject)
    with frozen.around():
        assert not any(p.requires_grad for p in subject.model.parameters())
        frozen.step()
    assert outputs[0].grad.abs().sum() > 0
    calibration._run_batches(forward, 1)
    assert not outputs[1].requires_grad


def test_the_parts_of_zo_taylor_are_those_that_it_consists_of(subject, monkeypatch):
    made, forwards = [], []
    noise = calibration.METRICS["zo_taylor"].noise
    monkeypatch.setattr(
        calibration.METRICS["zo_taylor"],
        "noise",
        lambda self, *key: made.append(key[1:]) or noise(self, *key),
    )
    subject.model.register_forward_hook(lambda *_: forwards.append(1))

    def counts(*names):
        for name in names:
            calibration._run_batches(calibration.ROWS[name](subject), 1)
        found = sorted(key[1:] for key in made), len(forwards)
        made.clear()
        forwards.clear()
        return found

    assert counts("zo_taylor") == counts("zo_forwards", "zo_noise")


def test_taylors_peak_holds_its_accumulators(run):
    rows = json.loads((run[0] / "calibration-tiny-fp32-cpu" / "figures.json").read_text())["rows"]
    weights = [layer.get_base_layer().weight for layer in make_subject().layers.values()]
    accumulator = 4 * sum(weight.numel() for weight in weights)
    assert rows["taylor_one_sum"]["peak_bytes"] > accumulator
    assert rows["taylor"]["peak_bytes"] >= rows["taylor_one_sum"]["peak_bytes"] + accumulator
    assert rows["group_taylor"]["peak_bytes"] < rows["frozen"]["peak_bytes"] + accumulator


def test_one_row_a_batch_is_enough_for_quantile_mean():
    row = calibration.ROWS["quantile_mean"](make_subject(batch_size=1))
    calibration._run_batches(row, 2)
    row.end()


def test_what_a_row_is_compared_with_is_measured_too():
    assert calibration.parse(["--rows", "taylor"]).rows == ["frozen", "taylor"]
    assert calibration.parse(["--rows", "wanda"]).rows == ["frozen", "forward", "wanda"]
    for name, make in calibration.ROWS.items():
        measured = calibration.parse(["--rows", name]).rows
        assert set(make(make_subject()).parts) <= set(measured)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--zo-directions", "0"], "0 is not at least 1"),
        (["--rows", "nothing"], "invalid choice"),
    ],
)
def test_a_wrong_option_ends_with_a_message(arguments, message, capsys, tmp_path):
    try:
        code = calibration.main([*arguments, "--output-dir", str(tmp_path)])
    except SystemExit as error:
        code = error.code
    assert code != 0
    assert message in capsys.readouterr().err.replace("`", "")
    assert not os.listdir(tmp_path)

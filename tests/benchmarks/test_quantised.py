"""The committed table is that of the committed figures, on equal budgets; and the errors at the
start are what the methods promise: less than QLoRA's for SPFT's exact rows and for LoftQ."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest
from quantised import save_base
from tiny_models import byte_tokenizer

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RESULTS = BENCHMARKS / "results" / "quantised-135m-docstrings"


@pytest.fixture(scope="module")
def benchmark():
    path = list(sys.path)
    sys.path.insert(0, str(BENCHMARKS))
    spec = importlib.util.spec_from_file_location(
        "quantised_benchmark", BENCHMARKS / "quantised.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def test_the_table_is_that_of_the_figures(benchmark):
    report = json.loads((RESULTS / "figures.json").read_text())
    assert benchmark.render(report) == (RESULTS / "table.md").read_text()
    runs = report["runs"]
    assert {run["method"] for run in runs} == set(benchmark.METHODS)
    assert all(len({r["seed"] for r in runs if r["method"] == m}) == 3 for m in benchmark.METHODS)
    counts = {run["trained_parameters"] for run in runs}
    assert max(counts) - min(counts) < 0.02 * max(counts)


def test_every_method_trains_on_the_same_budget(benchmark, tmp_path, monkeypatch):
    save_base(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "data").mkdir()
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"say {word}"},
                {"role": "assistant", "content": word},
            ]
        }
        for word in ("abc", "bcd", "cde", "def") * 4
    ]
    for name in ("train.jsonl", "held_out.jsonl"):
        (tmp_path / "data" / name).write_text("".join(json.dumps(c) + "\n" for c in chats))
    monkeypatch.setattr(benchmark, "R", 8)
    folders = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data")]
    arguments = [*folders, "--seeds", "1", "2", "--steps", "2", "--output-dir", str(tmp_path)]
    assert benchmark.main(arguments) == 0
    report = json.loads((tmp_path / RESULTS.name / "figures.json").read_text())
    first = {run["method"]: run for run in report["runs"] if run["seed"] == 1}
    assert len(report["runs"]) == 2 * len(benchmark.METHODS) == 2 * len(first)
    assert all(run["after"] != run["start"] for run in report["runs"])
    plain = first["QLoRA"]
    assert plain["relative_error_after"] == plain["relative_error_before"] > 0.05
    assert plain["nuclear_reduction"] == 0
    assert first["SPFT, quantised rows"]["nuclear_reduction"] == 0
    for method in ("SPFT, exact rows", "LoftQ"):
        assert first[method]["relative_error_after"] < 0.99 * plain["relative_error_after"]
        assert first[method]["nuclear_reduction"] > 0.01

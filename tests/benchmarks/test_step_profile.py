"""Invariants of benchmarks/step_profile.py (none about time):

- One command prints the tables and writes them and the figures under the method's name.
- The phases are those of a step; what a method names as a part of one does not count twice.
- Rows are sorted by absolute difference; shown rows and the rest add up to all.
- An operator that only one of the two runs counts as no time in the other.
"""

from __future__ import annotations

import json
import os

import pytest
import step_profile
import torch
from tiny_benchmark import make_workload, run_script

METHOD = "spft_write_through"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the results' folder and the output of one run of the script."""
    folder = tmp_path_factory.mktemp("profile") / "results"
    output, _ = run_script("step_profile.py", folder, "--method", METHOD, "--top", "5")
    assert os.listdir(folder) == ["step-profile-tiny-fp32-cpu"]
    return folder / "step-profile-tiny-fp32-cpu", output


def test_the_run_writes_the_tables_it_prints_and_the_figures(run):
    folder, output = run
    assert sorted(os.listdir(folder)) == ["figures.json", "table.md"]
    assert (folder / "table.md").read_text() == output
    report = json.loads((folder / "figures.json").read_text())
    assert report["method"] == METHOD
    assert report["options"]["repeats"] == 2
    parts = ["of it row rewriting"]
    assert [row["phase"] for row in report["phases"]] == [
        "forward",
        "backward",
        "optimizer",
        *parts,
    ]
    lines = output.splitlines()
    operators = lines[next(i for i, line in enumerate(lines) if "| operator" in line) + 2 :]
    assert len(operators) == 5 + 2
    assert operators[5].startswith(f"| the other {len(report['operators']) - 5} ")
    assert operators[6].startswith("| **all** ")


def test_the_operators_are_sorted_and_contain_the_products(run):
    rows = json.loads((run[0] / "figures.json").read_text())["operators"]
    differences = [abs(row["difference_ms"]) for row in rows]
    assert differences == sorted(differences, reverse=True)
    products = next(row for row in rows if row["operator"] == "aten::mm")
    assert 0 < products["floor_calls"] < products["method_calls"]
    assert all(r["difference_ms"] == r["method_ms"] - r["floor_ms"] for r in rows)
    outside = next(row for row in rows if row["operator"] == step_profile.STEP)
    assert outside["floor_calls"] == outside["method_calls"] == 1


def test_parts_of_a_phase_are_not_added_to_the_step():
    times = {"forward": 1.0, "backward": 2.0, "optimizer": 4.0, "of it rows": 3.0}
    phases = [{"phase": p, "floor_ms": 0.0, "method_ms": t} for p, t in times.items()]
    report = profile_report(phases=phases, operators=step_profile.differences({}, {"a": (1.0, 1)}))
    assert "| **step** | 0.000 | 7.000 | +7.000 |" in step_profile.render(report, 5)


def test_the_rest_and_the_shown_add_up():
    method = {"a": (5.0, 1), "b": (1.0, 2), "c": (2.0, 3)}
    rows = step_profile.differences({"d": (4.0, 7), "b": (1.5, 2)}, method)
    assert [row["operator"] for row in rows] == ["a", "d", "c", "b"]
    page = step_profile.render(profile_report(phases=[], operators=rows), 2)
    assert "| the other 2 | 1.500 | 3.000 | +1.500 | 2 | 5 |" in page
    assert "| **all** | 5.500 | 8.000 | +2.500 | 9 | 6 |" in page


def test_the_medians_take_an_absent_operator_for_no_time():
    repeats = [{"a": (1.0, 2)}, {"a": (3.0, 2), "b": (9.0, 1)}, {"a": (2.0, 2)}]
    assert step_profile.medians(repeats) == {"a": (2.0, 2), "b": (0.0, 0)}


def test_a_step_is_run_whole_and_parts_after_it():
    work = make_workload()
    method = step_profile.METHODS["lora"](work)
    seen = []
    method.parts["rows"] = lambda: seen.append(all(p.grad is None for p in method.trainable))
    before = [p.detach().clone() for p in method.trainable]
    times = step_profile.phase_times(method, torch.device("cpu"))
    assert list(times) == ["forward", "backward", "optimizer", "of it rows"]
    assert seen == [True]
    assert any(not torch.equal(a, b) for a, b in zip(before, method.trainable, strict=True))


def profile_report(**figures) -> dict:
    args = step_profile.parse(["--size", "tiny", "--device", "cpu"])
    report = step_profile.make_report("step_profile.py", [], args)
    return {**report, "method": "lora", "note": "", **figures}


def test_a_method_that_cannot_run_here_ends_with_a_message(monkeypatch, capsys, tmp_path):
    def unavailable(work):
        raise step_profile.UnavailableError("no such package")

    monkeypatch.setitem(step_profile.METHODS, "full", unavailable)
    arguments = ["--size", "tiny", "--device", "cpu", "--method", "full"]
    assert step_profile.main([*arguments, "--output-dir", str(tmp_path)]) == 1
    assert "error: no such package" in capsys.readouterr().err
    assert not os.listdir(tmp_path)

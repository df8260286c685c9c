"""The committed table is that of the committed figures, and the plugin takes every case's YAML."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

from axolotl_spft.args import read_args
from axolotl_spft.checks import check_classes

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
RESULTS = BENCHMARKS / "results" / "quality-135m-docstrings"


@pytest.fixture(scope="module")
def quality():
    spec = importlib.util.spec_from_file_location("quality", BENCHMARKS / "quality.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    spec.loader.exec_module(module)
    sys.path[:] = path
    return module


def test_the_table_is_that_of_the_figures(quality):
    report = json.loads((RESULTS / "figures.json").read_text())
    table = quality.render(report)
    assert table == (RESULTS / "table.md").read_text()
    assert {row["case"] for row in report["rows"]} == set(quality.CASES)
    # the same budget for all, the global allocation included
    counts = {row["trainable_parameters"] for row in report["rows"]}
    assert max(counts) - min(counts) < 2000
    losses = [float(line.split("|")[2].split("(")[0]) for line in table.splitlines()[4:]]
    assert losses == sorted(losses)


def test_every_case_is_accepted(quality):
    for keys in quality.CASES.values():
        cfg = {"adapter": "prune_spft", "spft_r": 64, **keys}
        read_args(cfg)
        check_classes(cfg)

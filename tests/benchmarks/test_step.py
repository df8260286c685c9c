"""Invariants of benchmarks/step.py and benchmarks/measuring.py (none about time):

- One command measures every method in every round, prints the table and writes it, the figures and
  the picture, with the command, options, machine and versions; nothing else is left in the folder.
- Ratios are of times of the same round; peak memory is the sum of its three parts.
- A method that runs out of memory, when built, warmed up or measured, or that cannot run here, is
  reported, and the others are measured all the same; the floor must fit.
- Each round runs every step once, and each step's round begins elsewhere than the last; a time
  limit ends them after a whole round.
- A wrong option ends in a non-zero exit code and a message; other experiments get other names.
"""

from __future__ import annotations

import json
import os
import sys
import weakref

import measuring
import methods
import pytest
import step
import torch
from tiny_benchmark import make_workload, run_script

NAMES = list(methods.METHODS)
KEYS = ("weight_bytes", "optimizer_state_bytes", "step_peak_bytes")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the results' folder, output and arguments of one run of the script."""
    folder = tmp_path_factory.mktemp("benchmark") / "results"
    output, arguments = run_script("step.py", folder, "--methods", *NAMES)
    assert os.listdir(folder) == ["step-tiny-fp32-cpu"]
    return folder / "step-tiny-fp32-cpu", output, arguments


def test_the_run_writes_the_table_it_prints_and_the_figures(run):
    folder, output, arguments = run
    assert sorted(os.listdir(folder)) == ["figures.json", "picture.svg", "table.md"]
    assert (folder / "table.md").read_text() == output
    report = json.loads((folder / "figures.json").read_text())
    assert report["command"].split() == ["python", "benchmarks/step.py", *arguments]
    assert report["options"]["repeats"] == report["rounds"] == 2
    assert report["options"]["attention"] == "sdpa"
    assert report["machine"]["threads"] >= 1
    assert set(report["versions"]) == {"python", *measuring.PACKAGES}
    assert report["date"].startswith("20")
    table = [line for line in output.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in table}) == 1
    assert [row.split()[1] for row in table[2:]] == list(report["methods"])
    assert [*report["methods"], *report["left_out"]] == NAMES
    share = report["trained_share_of_linear_weights"]
    assert f"p = {share:.1%}" in output
    assert f"at most {1.03 + share / 2:.3f} x frozen (1.03 + p/2)" in output
    for name in report["methods"]:
        assert f">{name}</text>" in (folder / "picture.svg").read_text()


def test_the_figures_of_every_method_fit_together(run):
    methods_ = json.loads((run[0] / "figures.json").read_text())["methods"]
    lora, shira = methods_["lora"], methods_["shira"]
    for figures in methods_.values():
        assert len(figures["seconds"]) == 2
        assert figures["min_seconds"] <= figures["median_seconds"] <= figures["max_seconds"]
        assert figures["peak_bytes"] == sum(figures[key] for key in KEYS)
        assert figures["step_peak_bytes"] > 0
        assert figures["peak_ratio_to_lora"] == figures["peak_bytes"] / lora["peak_bytes"]
        assert figures["peak_ratio_to_shira"] == figures["peak_bytes"] / shira["peak_bytes"]
        ratios = [a / b for a, b in zip(figures["seconds"], lora["seconds"], strict=True)]
        assert figures["min_ratio_to_lora"] == pytest.approx(min(ratios))
    assert methods_["frozen"]["ratio_to_frozen"] == 1
    assert methods_["frozen"]["trainable_parameters"] == 0
    assert methods_["frozen"]["optimizer_state_bytes"] == 0
    base = methods_["frozen"]["weight_bytes"]
    assert methods_["full"]["weight_bytes"] == base
    # fp32 adapters; SHiRA has two int32 indices beside each of its weights
    assert lora["weight_bytes"] == base + 4 * lora["trainable_parameters"]
    assert shira["weight_bytes"] == base + 12 * shira["trainable_parameters"]
    assert shira["step_peak_bytes"] > lora["step_peak_bytes"]


def test_the_spft_rows_hold_what_they_need_and_are_held_against_the_goals(run):
    report = json.loads((run[0] / "figures.json").read_text())
    rows = report["methods"]
    base = rows["frozen"]["weight_bytes"]
    delta, written = rows["spft_delta"], rows["spft_write_through"]
    assert delta["weight_bytes"] > base + 4 * delta["trainable_parameters"]  # and the indices
    # the pretrained rows are kept beside the delta
    assert written["weight_bytes"] >= delta["weight_bytes"] + 4 * written["trainable_parameters"]
    assert [goal["figure"] for goal in report["goals"]] == [
        "ratio_to_frozen",
        "ratio_to_lora",
        "peak_ratio_to_shira",
    ]
    for goal in report["goals"]:
        assert goal["measured"] == written[goal["figure"]]
        assert goal["met"] == (goal["measured"] <= goal["at_most"])


def test_a_gpu_has_goals_of_its_own():
    row = dict.fromkeys(
        ("ratio_to_frozen", "ratio_to_lora", "peak_ratio_to_lora", "peak_ratio_to_shira"), 0.78
    )
    limits = {}
    for checkpointing in (False, True):
        work = make_workload(device=torch.device("cuda"), checkpointing=checkpointing)
        goals = step.goals({"spft_write_through": row}, work)
        limits[checkpointing] = {goal["figure"]: goal["at_most"] for goal in goals}
        assert {goal["figure"] for goal in goals if not goal["met"]} == {"ratio_to_lora"}
    assert limits[True] == {"ratio_to_frozen": 1.03, "ratio_to_lora": 0.75} | {
        "peak_ratio_to_shira": 0.80
    }
    assert limits[False] == limits[True] | {"peak_ratio_to_lora": 0.80}
    assert step.goals({"lora": row}, work) == []


@pytest.mark.parametrize("when", ["built", "warmed up", "measured"])
def test_a_method_without_memory_keeps_its_row_and_the_others_go_on(monkeypatch, when):
    exhaust_lora(monkeypatch, when)
    report = measured(["frozen", "lora", "miss"])
    assert report["methods"]["lora"] == {"note": "", "out_of_memory": True}
    assert len(report["methods"]["miss"]["seconds"]) == 1
    assert "ratio_to_lora" not in report["methods"]["miss"]
    lines = [line for line in report["page"].splitlines() if line.startswith("| lora")]
    assert lines == ["| lora | out of memory |  |  |  |  |  |  |"]
    assert report["picture"].count("out of memory") == 2


def test_a_method_that_is_dropped_leaves_its_memory(monkeypatch):
    models = []
    exhaust_lora(monkeypatch, "measured", lambda method: models.append(weakref.ref(method.model)))
    ready = step.prepare(["frozen", "lora"], make_workload(), warmup=1, log=lambda text: None)
    assert list(ready.methods) == ["frozen"]
    assert models[0]() is None


def exhaust_lora(monkeypatch, when: str, look=lambda method: None) -> None:
    """Let LoRA's memory run out when it is built, in its first step or in its second."""
    build = methods.METHODS["lora"]
    steps = {"built": 0, "warmed up": 0, "measured": 1}[when]

    def exhausted(work):
        if when == "built":
            raise torch.OutOfMemoryError("no")
        method = build(work)
        look(method)
        update, calls = method.update, []

        def limited():
            calls.append(1)
            if len(calls) > steps:
                raise torch.OutOfMemoryError("no")
            update()

        method.update = limited
        return method

    monkeypatch.setitem(methods.METHODS, "lora", exhausted)


def measured(names: list[str]) -> dict:
    """Measure one round and return the report with its page and picture."""
    work = make_workload()
    figures = step.measure(names, work, warmup=1, repeats=1, log=lambda text: None)
    args = step.parse(["--size", "tiny", "--device", "cpu"])
    report = measuring.make_report("step.py", [], args, **figures)
    return {**report, "page": step.render(report), "picture": step.picture(report)}


def test_no_memory_for_the_floor_is_an_error(monkeypatch, capsys, tmp_path):
    def exhausted(work):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setitem(methods.METHODS, "frozen", exhausted)
    arguments = ["--size", "tiny", "--methods", "lora", "--output-dir", str(tmp_path)]
    assert step.main([*arguments, "--device", "cpu"]) == 1
    assert "error: frozen runs out of memory; lower" in capsys.readouterr().err
    assert not os.listdir(tmp_path)


def test_a_method_that_cannot_run_here_is_left_out_with_the_reason(monkeypatch):
    def unavailable(work):
        raise methods.UnavailableError("no such package")

    monkeypatch.setitem(methods.METHODS, "lora", unavailable)
    report = measured(["frozen", "lora", "miss"])
    assert list(report["methods"]) == ["frozen", "miss"]
    assert report["left_out"] == {"lora": "no such package"}
    assert "- left out: lora (no such package)" in report["page"]


def test_without_bitsandbytes_the_eight_bit_row_is_left_out(monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(methods.UnavailableError, match="bitsandbytes cannot be imported"):
        methods.METHODS["spft_8bit"](make_workload())


def test_rounds_are_interleaved_and_rotated():
    calls = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    seconds = measuring.time_rounds(steps, 4, torch.device("cpu"))
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 4, "b": 4, "c": 4}


def test_a_time_limit_ends_with_a_whole_round():
    calls = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    seconds = measuring.time_rounds(steps, 9, torch.device("cpu"), time_limit=0.0)
    assert "".join(calls) == "abc"
    assert {len(values) for values in seconds.values()} == {1}


def test_the_ratio_is_the_median_of_the_rounds_own_ratios():
    # Each round is another machine; the ratio of the medians would be 3 / 2.
    figures = step.time_figures("a", {"a": [2.0, 30.0, 3.0], "frozen": [1.0, 10.0, 2.0]})
    assert figures["median_seconds"] == 3.0
    assert figures["ratio_to_frozen"] == 2.0
    assert (figures["min_ratio_to_frozen"], figures["max_ratio_to_frozen"]) == (1.5, 3.0)


def test_the_floor_is_always_among_the_methods():
    assert step.parse(["--methods", "lora"]).methods == ["frozen", "lora"]
    assert step.parse(["--methods", "full", "frozen"]).methods == ["frozen", "full"]


def test_every_experiment_has_a_name_of_its_own():
    options = ([], ["--checkpointing"], ["--compile"], ["--attention", "eager"])
    base = ["--size", "tiny", "--device", "cpu"]
    names = [measuring.run_name("step", step.parse(base + more)) for more in options]
    assert names[0] == "step-tiny-fp32-cpu"
    assert [name.removeprefix(names[0]) for name in names[1:]] == [
        "-checkpointing",
        "-compile",
        "-eager",
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--r", "0"], "0 is not at least 1"),
        (["--size", "2b"], "invalid choice"),
        (["--methods", "nothing"], "invalid choice"),
        (["--attention", "flash_attention_2", "--device", "cpu"], "use --attention sdpa"),
    ],
)
def test_a_wrong_option_ends_with_a_message(arguments, message, capsys, tmp_path):
    try:
        code = step.main([*arguments, "--output-dir", str(tmp_path)])
    except SystemExit as error:
        code = error.code
    assert code != 0
    assert message in capsys.readouterr().err
    assert not os.listdir(tmp_path)

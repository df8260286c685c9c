"""Invariants of benchmarks/step.py and benchmarks/memory.py (none about time):

- One command measures every method in every round, prints the table and writes it and the figures,
  with the command, options, machine and versions; nothing else is left in the folder.
- Every method starts from the same weights, and a step moves exactly its trainable parameters and
  leaves no gradients; LoRA's are within 10 % of SPFT's.
- SPFT's AdamW state is 8 bytes per trainable parameter, besides the step counters, also over a
  bf16 base.
- The floor trains nothing and runs backward down to the embeddings' output.
- Each round runs every step once, and each step's round begins elsewhere than the last.
- The tracker counts storages made inside it exactly: views, in-place results, resurrected Python
  objects and what was there before count nothing; what is freed counts nothing any more.
- A wrong option ends in a non-zero exit code and a message.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import measuring
import pytest
import torch
import workload

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1"}
MIB = 2**20


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # step.py imports memory.py by this name, as when run as a script
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def memory():
    yield load("memory")
    sys.modules.pop("memory", None)


@pytest.fixture(scope="module")
def step(memory):
    yield load("step")
    sys.modules.pop("step", None)


@pytest.fixture(params=["fp32", "bf16", "fp32-checkpointing"])
def work(step, request):
    dtype, _, checkpointing = request.param.partition("-")
    return make_workload(step, dtype=workload.DTYPES[dtype], checkpointing=bool(checkpointing))


def make_workload(step, **changes):
    options = {"dtype": torch.float32, "seq_len": 16, "batch_size": 2, "checkpointing": False}
    options |= {"device": torch.device("cpu"), "size": workload.SIZES["tiny"], "r": 8}
    return workload.Workload(**options | changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return the folder, output and arguments of one run of the script."""
    folder = tmp_path_factory.mktemp("benchmark") / "results"
    options = {"size": "tiny", "repeats": 2, "warmup": 1, "seq-len": 16, "batch-size": 2}
    options |= {"device": "cpu", "output-dir": folder}
    arguments = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, str(BENCHMARKS / "step.py"), *arguments]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout, arguments


def test_the_run_writes_the_table_it_prints_and_the_figures(run, step):
    folder, output, arguments = run
    assert sorted(os.listdir(folder)) == ["step-tiny-fp32-cpu.json", "step-tiny-fp32-cpu.md"]
    assert (folder / "step-tiny-fp32-cpu.md").read_text() == output
    report = json.loads((folder / "step-tiny-fp32-cpu.json").read_text())
    assert report["command"].split()[:2] == ["python", "benchmarks/step.py"]
    assert report["command"].split()[2:] == arguments
    assert report["options"]["repeats"] == 2
    assert report["options"]["seq_len"] == 16
    assert report["machine"]["cpu"]
    assert report["machine"]["threads"] >= 1
    assert set(report["versions"]) == {"python", *measuring.PACKAGES}
    assert report["versions"]["torch"] == torch.__version__
    assert report["date"].startswith("20")
    rows = [line for line in output.splitlines() if line.startswith("|")][2:]
    assert [row.split()[1] for row in rows] == list(step.METHODS)


def test_the_figures_of_every_method_fit_together(run, step):
    folder, _, _ = run
    methods = json.loads((folder / "step-tiny-fp32-cpu.json").read_text())["methods"]
    assert list(methods) == list(step.METHODS)
    for figures in methods.values():
        assert len(figures["seconds"]) == 2
        assert figures["min_seconds"] <= figures["median_seconds"] <= figures["max_seconds"]
        assert figures["step_peak_bytes"] > 0
    assert methods["frozen"]["ratio_to_frozen"] == 1
    assert methods["frozen"]["trainable_parameters"] == 0
    assert methods["frozen"]["optimizer_state_bytes"] == 0
    base = methods["frozen"]["weight_bytes"]
    assert methods["full"]["weight_bytes"] == base
    spft = methods["spft"]["trainable_parameters"]
    assert methods["spft"]["weight_bytes"] > base + 4 * spft  # and the indices
    assert methods["lora"]["trainable_parameters"] == pytest.approx(spft, rel=0.1)
    # A method that trains keeps more for its backward than one that does not.
    assert methods["spft"]["step_peak_bytes"] > methods["frozen"]["step_peak_bytes"]


@pytest.mark.parametrize("size", ["135m", "1b", "8b"])
def test_the_named_sizes_are_those_models_and_train_five_percent(step, size):
    work = make_workload(step, size=workload.SIZES[size], device=torch.device("meta"))
    model = work.base_model()
    total = sum(p.numel() for p in model.parameters())
    assert total == {"135m": 134515008, "1b": 1235814400, "8b": 8030261248}[size]
    layers = [model.get_submodule(name) for name in step.default_target_modules(model)]
    trainable = work.size.r * sum(layer.in_features for layer in layers)
    assert trainable / total == pytest.approx(0.05, abs=0.005)


@pytest.mark.parametrize("name", ["frozen", "spft", "lora", "full"])
def test_every_method_starts_from_the_same_weights_and_moves_its_own(step, work, name):
    base = work.base_model().state_dict()
    method = step.METHODS[name](work)
    before = {n: p.detach().clone() for n, p in method.model.named_parameters()}
    for parameter_name, value in base.items():
        plain = [v for n, v in before.items() if same_parameter(n, parameter_name)]
        assert len(plain) == 1 or parameter_name == "lm_head.weight"  # tied
        assert all(torch.equal(value, v) for v in plain)
    trainable = {id(p) for p in method.trainable}
    if method.optimizer is not None:
        method.optimizer.param_groups[0]["lr"] = 0.1  # 1e-3 rounds away in bf16
    for _ in range(2):  # LoRA's A has no gradient until B has moved
        method.step()
    for parameter_name, parameter in method.model.named_parameters():
        moved = not torch.equal(parameter, before[parameter_name])
        assert moved == (id(parameter) in trainable), parameter_name
        assert parameter.grad is None


def same_parameter(name: str, base_name: str) -> bool:
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".") == base_name


def test_equal_budgets_whatever_r(step):
    for r in (4, 10, 32):
        work = make_workload(step, r=r)
        counts = [sum(p.numel() for p in step.METHODS[n](work).trainable) for n in ("spft", "lora")]
        assert counts[1] == pytest.approx(counts[0], rel=0.1)


def test_adamw_holds_eight_bytes_per_trainable_and_step_counters(step, work):
    method = step.build_spft(work)
    method.step()
    compact = sum(p.numel() for p in method.trainable)
    assert {p.dtype for p in method.trainable} == {torch.float32}
    counters = sum(s["step"].numel() * 4 for s in method.optimizer.state.values())
    assert counters == 4 * len(method.trainable)
    assert step.optimizer_state_bytes(method.optimizer) == 8 * compact + counters


def test_the_floor_runs_backward_to_the_embeddings_and_trains_nothing(step, work):
    method = step.build_frozen(work)
    assert not any(p.requires_grad for p in method.model.parameters())
    outputs = []
    method.model.get_input_embeddings().register_forward_hook(
        lambda module, inputs, output: outputs.append(output)
    )
    method.step()
    assert outputs[0].grad.abs().sum() > 0


def test_rounds_are_interleaved_and_rotated(step):
    calls = []
    steps = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    seconds = measuring.time_rounds(steps, 4, torch.device("cpu"))
    assert "".join(calls) == "abc" + "bca" + "cab" + "abc"
    assert {name: len(values) for name, values in seconds.items()} == {"a": 4, "b": 4, "c": 4}


def test_the_ratio_is_the_median_of_the_rounds_own_ratios(step):
    method = step.Method(lambda: None, torch.nn.Linear(1, 1), [])
    # Each round is another machine; the ratio of the medians would be 3 / 2.
    figures = step._figures(method, [2.0, 30.0, 3.0], [1.0, 10.0, 2.0], step_bytes=0)
    assert figures["median_seconds"] == 3.0
    assert figures["ratio_to_frozen"] == 2.0
    assert (figures["min_ratio_to_frozen"], figures["max_ratio_to_frozen"]) == (1.5, 3.0)


def test_the_floor_is_always_among_the_methods(step):
    assert step.parse(["--methods", "lora"]).methods == ["frozen", "lora"]
    assert step.parse(["--methods", "spft", "frozen"]).methods == ["frozen", "spft"]


def test_the_tracker_counts_a_known_pattern(memory):
    before = torch.zeros(MIB, dtype=torch.uint8)
    with memory.StorageTracker() as tracker:
        first = torch.empty(3 * MIB, dtype=torch.uint8)
        assert tracker.live_bytes == 3 * MIB
        second = first + 1
        assert tracker.live_bytes == 6 * MIB
        del first
        assert tracker.live_bytes == 3 * MIB
        parts = [second[: MIB // 2], second.view(3, -1), second.detach(), second.add_(1)]
        before.add_(1)
        views = before[1:].view(torch.int8)
        assert tracker.live_bytes == 3 * MIB
        del second
        assert tracker.live_bytes == 3 * MIB  # the views keep it
        del parts
        assert tracker.live_bytes == 0
        del before, views
        assert tracker.live_bytes == 0  # freeing what was there before makes nothing negative
        assert tracker.peak_bytes == 6 * MIB
        # The same addresses again: a freed storage's entry must not hide its successor.
        for _ in range(10):
            torch.empty(2 * MIB, dtype=torch.uint8)
        assert tracker.live_bytes == 0
        assert tracker.peak_bytes == 6 * MIB
        kept = torch.ones(MIB, dtype=torch.uint8)
    del kept
    assert tracker.live_bytes == MIB  # what happens after the block is not its business
    assert tracker.peak_bytes == 6 * MIB


def test_the_tracker_sees_what_only_autograd_holds(memory):
    x = torch.ones(MIB // 4, requires_grad=True)
    with memory.StorageTracker() as tracker:
        y = x.exp().exp()  # both results are saved for the backward; one has no Python object
        assert tracker.live_bytes == 2 * MIB
        y.backward(torch.ones_like(y))
        del y
        assert tracker.live_bytes == MIB  # the gradient
        x.grad = None
        assert tracker.live_bytes == 0


def test_peak_above_start_leaves_out_what_is_there(memory):
    weight = torch.ones(MIB, dtype=torch.uint8)
    peak = memory.peak_bytes_above_start(lambda: (weight + 1) + 1, torch.device("cpu"))
    assert peak == 2 * MIB


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "tiny", "--r", "1000"], "r is 1000"),
        (["--r", "0"], "0 is not at least 1"),
        (["--size", "2b"], "invalid choice"),
        (["--methods", "nothing"], "invalid choice"),
    ],
)
def test_a_wrong_option_ends_with_a_message(step, arguments, message, capsys, tmp_path):
    try:
        code = step.main([*arguments, "--output-dir", str(tmp_path)])
    except SystemExit as error:
        code = error.code
    assert code != 0
    assert message in capsys.readouterr().err
    assert not os.listdir(tmp_path)

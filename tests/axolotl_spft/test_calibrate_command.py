"""`spft calibrate`: the scores of a training run without the training run.

Invariants: the file is the one that a training run of the same YAML leaves, bit for bit, and
training by it gives the same adapter, bit for bit; nothing is trained, and nothing but the file is
left behind; a mistake takes one line and exit code 1, and writes nothing.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import cpu_processes
import pytest
import tomllib
from axolotl_runs import own_process_state, same_tensors, spft_yaml, train, write_yaml
from click.testing import CliRunner

from axolotl_spft import SPFTPlugin
from axolotl_spft.calibrate import calibrate_yaml
from axolotl_spft.cli import calibrate, main, merge
from trainer_ext import ImportanceScores, SpftError
from trainer_ext.files.atomic import read_tensors
from trainer_ext.importance.metrics.group_taylor import GroupTaylor

PYPROJECT = Path(__file__).parents[2] / "pyproject.toml"


@pytest.fixture
def temporary(monkeypatch):
    """The folder for temporary files; its path is short, because sockets are made in it."""
    with tempfile.TemporaryDirectory() as folder:
        monkeypatch.setattr(tempfile, "tempdir", folder)
        yield Path(folder)


def run(*arguments, command=main):
    with own_process_state():
        return CliRunner().invoke(command, [str(a) for a in arguments])


def calibrated(config: dict, tmp_path, *arguments, name="scores.safetensors"):
    """`spft calibrate` of a configuration; gives the file that it has written."""
    output = tmp_path / name
    done = run("calibrate", write_yaml(config, tmp_path / "never"), "-o", output, *arguments)
    assert done.exit_code == 0, done.output
    last = done.stdout.rstrip("\n").splitlines()[-1]
    assert last.startswith(f"axolotl-spft: {output} has the")
    assert not (tmp_path / "never").exists()
    return output


CASES = {
    "group_taylor": {},
    "accumulated": {"gradient_accumulation_steps": 2, "micro_batch_size": 2},
    "packed": {"sample_packing": True, "micro_batch_size": 1},
    "noise": {"neftune_noise_alpha": 5, "overrides_of_model_config": {"attention_dropout": 0.2}},
    "taylor": {"spft_importance": "taylor", "spft_accumulator_offload": True},
    "zo_taylor": {"spft_importance": "zo_taylor", "spft_zo_directions": 2},
    "wanda": {"spft_importance": "wanda", "gradient_checkpointing": True},
    "magnitude": {"spft_importance": "magnitude"},
    "random": {"spft_importance": "random", "spft_seed": 3},
}


@pytest.mark.parametrize("case", CASES)
def test_file_is_that_of_a_training_run(assets, tmp_path, temporary, case):
    config = spft_yaml(assets, max_steps=3, **CASES[case])
    file = calibrated(config, tmp_path)
    assert not list(temporary.glob("spft*"))
    with own_process_state():
        whole = train(config, tmp_path / "whole")
    with own_process_state():
        by_file = train({**config, "spft_importance_file": str(file)}, tmp_path / "by_file")

    left = read_tensors(whole.out / "spft_importance.safetensors", "spft_importance")
    made = read_tensors(file, "spft_importance")
    assert same_tensors(made[0], left[0])
    for metadata in (made[1], left[1]):
        metadata.pop("seconds")
    assert made[1] == left[1]

    assert by_file.calibration == []
    assert same_tensors(by_file.tensors, whole.tensors)
    assert by_file.step_losses == whole.step_losses


def test_nothing_is_trained_and_output_dir_is_left_alone(assets, tmp_path, monkeypatch):
    from transformers import Trainer, TrainerCallback

    def never(*args, **kwargs):
        raise AssertionError("training has begun")

    class Tracker(TrainerCallback):
        on_train_begin = never  # as those of Weights & Biases and others, that open a run there

    monkeypatch.setattr(Trainer, "training_step", never)
    monkeypatch.setattr(SPFTPlugin, "add_callbacks_pre_trainer", lambda *args: [Tracker()])
    output_dir = tmp_path / "never"
    output_dir.mkdir()
    (output_dir / "adapter_model.safetensors").write_bytes(b"an earlier run's")
    config = spft_yaml(assets, save_strategy="steps", save_steps=1)
    done = run("calibrate", write_yaml(config, output_dir), "-o", tmp_path / "scores")
    assert done.exit_code == 0, done.output
    assert [path.name for path in output_dir.iterdir()] == ["adapter_model.safetensors"]
    assert (output_dir / "adapter_model.safetensors").read_bytes() == b"an earlier run's"


def test_keys_of_use_to_the_training_run_alone_do_not_matter(assets, tmp_path):
    """One YAML can serve both commands: it may name the very file that is to be made."""
    plain = calibrated(spft_yaml(assets), tmp_path)
    changes = {
        "spft_importance_file": str(tmp_path / "other.safetensors"),
        "spft_allocation": "global",
        "spft_allocation_floor": 0.5,
        "resume_from_checkpoint": str(tmp_path / "no checkpoint"),
    }
    other = calibrated(spft_yaml(assets, **changes), tmp_path, name="other.safetensors")
    assert same_tensors(*(ImportanceScores.load(path).scores for path in (plain, other)))


def test_the_yaml_need_not_name_the_plugin(assets, tmp_path):
    named, other = spft_yaml(assets), spft_yaml(assets, plugins=None)
    files = [calibrated(named, tmp_path, name="named"), calibrated(other, tmp_path, name="other")]
    assert same_tensors(*(ImportanceScores.load(path).scores for path in files))


def test_keys_can_be_replaced(assets, tmp_path):
    options = ["--spft-importance=random", "--spft_seed=7", "--strict=true"]
    replaced = calibrated(spft_yaml(assets), tmp_path, *options, name="replaced")
    wanted = spft_yaml(assets, spft_importance="random", spft_seed=7)
    plain = calibrated(wanted, tmp_path, name="plain")
    assert same_tensors(*(ImportanceScores.load(path).scores for path in (replaced, plain)))


def test_promised_commands(assets, tmp_path, monkeypatch):
    """`spft` and the commands of `axolotl` are what pyproject.toml says they are."""
    from axolotl.cli import plugins

    project = tomllib.loads(PYPROJECT.read_text())["project"]
    module, _, name = project["scripts"]["spft"].partition(":")
    assert getattr(importlib.import_module(module), name) is main

    entries = project["entry-points"][plugins.ENTRY_POINT_GROUP]
    found = [
        importlib.metadata.EntryPoint(name, value, plugins.ENTRY_POINT_GROUP)
        for name, value in entries.items()
    ]
    monkeypatch.setattr(plugins, "entry_points", lambda group: found)
    group = plugins.PluginCommandGroup(name="axolotl")
    assert group.get_command(None, "spft-calibrate").resolve() is calibrate
    assert group.get_command(None, "spft-merge").resolve() is merge
    yaml = write_yaml(spft_yaml(assets, spft_importance="magnitude"), tmp_path / "never")
    options = ["-o", tmp_path / "scores", "--spft-r=3"]
    done = run("spft-calibrate", yaml, *options, command=group)
    assert done.exit_code == 0, done.output
    assert ImportanceScores.load(tmp_path / "scores").metric == "magnitude"


MISTAKES = [
    ({"spft_importanc": "random"}, [], ["spft_importanc ", "did you mean spft_importance?"]),
    (
        {"spft_r_pattern": {"q_proj": 40}},
        [],
        ["spft_r_pattern gives layer", "40 neurons", "lower the number to at most 32"],
    ),
    ({"fp16": True}, [], ["fp16 with spft_importance 'group_taylor'", "use bf16"]),
    ({}, ["--spft-r=0"], ["spft_r is 0", "at least 1"]),
    ({}, ["spft_r=4"], ["spft_r=4 is not understood", "--key=value"]),
    ({"adapter": "lora"}, [], ["adapter is 'lora'", "only adapter: prune_spft"]),
    (
        {"spft_importance_file": "there.safetensors"},
        [],
        ["spft_importance_file is 'there.safetensors'", "drop the key", "as the output"],
    ),
    ({"lora_model_dir": "a folder"}, [], ["lora_model_dir is 'a folder'", "drop the key"]),
    ({"use_ray": True}, [], ["use_ray is True", "without Ray"]),
]


@pytest.mark.parametrize(("changes", "options", "parts"), MISTAKES, ids=str)
def test_mistakes_take_one_line(assets, tmp_path, temporary, changes, options, parts, monkeypatch):
    if "fp16" in changes:  # which Axolotl allows on GPUs alone
        monkeypatch.setattr("accelerate.Accelerator.mixed_precision", "fp16")
        changes = {}
    yaml = write_yaml(spft_yaml(assets, **changes), tmp_path / "never")
    done = run("calibrate", yaml, "-o", tmp_path / "scores", *options)
    _check(done, tmp_path / "scores", parts)
    assert not list(temporary.glob("spft*"))
    assert not (tmp_path / "never").exists()


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        (None, ["cannot be read", "give an Axolotl YAML"]),
        ("a: [", ["is no YAML file"]),
        ("just words", ["holds no keys"]),
    ],
)
def test_files_that_are_no_configuration(tmp_path, text, parts):
    path = tmp_path / "config.yml"
    if text is not None:
        path.write_text(text)
    done = run("calibrate", path, "-o", tmp_path / "scores")
    _check(done, tmp_path / "scores", ["config.yml", *parts])


def _check(done, output: Path, parts: list[str]) -> None:
    assert done.exit_code == 1
    line, position = done.stderr.rstrip("\n").splitlines()[-1], 0
    assert line.startswith("axolotl-spft: ")
    assert done.stderr.count("axolotl-spft: ") == 1
    for part in parts:
        position = line.find(part, position)
        assert position >= 0, f"{part!r} is missing, or out of order, in: {line}"
    assert not output.exists()


def test_output_that_cannot_be_written(assets, tmp_path, monkeypatch):
    yaml = write_yaml(spft_yaml(assets, spft_importance="magnitude"), tmp_path / "never")
    done = run("calibrate", yaml, "-o", tmp_path)
    assert done.exit_code == 1
    assert "is a folder" in done.stderr.splitlines()[-1]

    def fails(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("trainer_ext.files.atomic.os.replace", fails)
    (tmp_path / "place").mkdir()
    done = run("calibrate", yaml, "-o", tmp_path / "place" / "scores")
    _check(done, tmp_path / "place" / "scores", ["cannot be written", "No space left"])
    assert not list((tmp_path / "place").iterdir())


def test_an_interrupt_writes_nothing(assets, tmp_path, temporary, monkeypatch):
    def interrupted(self, run_batch):
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(GroupTaylor, "observe", interrupted)
    yaml = write_yaml(spft_yaml(assets), tmp_path / "never")
    done = run("calibrate", yaml, "-o", tmp_path / "scores")
    assert done.exit_code == 1
    assert not (tmp_path / "scores").exists()
    assert not list(temporary.glob("spft*"))


def test_python_function_and_what_it_leaves_in_the_process(assets, tmp_path):
    """A later training run in the same process trains as ever."""
    config = spft_yaml(assets)
    yaml = write_yaml(config, tmp_path / "never")
    argv = list(sys.argv)
    with own_process_state():
        scores = calibrate_yaml(yaml, tmp_path / "scores", {"spft_calibration_batches": 1})
    assert scores.batches == 1
    with own_process_state(), pytest.raises(SpftError):
        calibrate_yaml(yaml, tmp_path / "scores", {"spft_r": 0})
    assert sys.argv == argv
    assert len(train(config, tmp_path / "out").losses) == 2


def test_two_processes_score_their_global_batches(assets, tmp_path, monkeypatch):
    """Real processes: two with one micro batch each give what one gives with two."""
    on_cpu = {"max_memory": {"cpu": "20GiB"}, "experimental_skip_move_to_device": True}
    config = spft_yaml(assets, micro_batch_size=2)
    yaml = write_yaml({**config, **on_cpu}, tmp_path / "never")
    bin_folder = Path(sys.executable).parent
    launch = [str(bin_folder / "accelerate"), "launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    done = subprocess.run(
        [
            *launch,
            cpu_processes.__file__,
            "axolotl_spft.cli",
            "calibrate",
            str(yaml),
            "-o",
            str(tmp_path / "two"),
        ],
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("axolotl-spft: ") == 1
    assert not (tmp_path / "never").exists()
    create = SPFTPlugin.post_trainer_create

    def and_average(self, cfg, trainer):
        create(self, cfg, trainer)
        cpu_processes.average_micro_batches_alone(trainer)

    monkeypatch.setattr(SPFTPlugin, "post_trainer_create", and_average)
    one = ImportanceScores.load(
        calibrated({**config, "gradient_accumulation_steps": 2}, tmp_path, name="one")
    )
    two = ImportanceScores.load(tmp_path / "two")
    assert (two.batches, two.metric) == (one.batches, one.metric)
    assert two.scores.keys() == one.scores.keys()
    for name, scores in one.scores.items():
        assert (two.scores[name] - scores).abs().max() <= 1e-5 * scores.max()


def test_a_mistake_in_a_process_of_its_own(assets, tmp_path):
    yaml = write_yaml(spft_yaml(assets, spft_r=0), tmp_path / "never")
    command = [sys.executable, "-m", "axolotl_spft.cli", "calibrate", str(yaml), "-o", "scores"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=240)
    assert done.returncode == 1
    assert "Traceback" not in done.stdout + done.stderr
    last = done.stderr.rstrip("\n").splitlines()[-1]
    assert last == "axolotl-spft: spft_r is 0; allowed is a whole number of at least 1"
    assert not (tmp_path / "scores").exists()

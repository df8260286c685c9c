"""The quickstart at tiny size, whole: it trains by `axolotl train`, measures and writes its result;
an interrupted run continues from its last whole checkpoint; a finished one is trained anew. Its
held-out loss counts every answer token once, and nothing else."""

from __future__ import annotations

import json
import sys
from functools import partial
from pathlib import Path
from subprocess import CompletedProcess
from types import SimpleNamespace

import forked
import pytest
import torch
import yaml
from tiny_models import byte_tokenizer, tiny_model

ROOT = Path(__file__).resolve().parents[2]
CHATS = [
    [
        {"role": "user", "content": f"say {word}"},
        {"role": "assistant", "content": word * (1 + i % 3)},
    ]
    for i, word in enumerate(["one", "two", "three", "four"] * 6)
]


@pytest.fixture
def quickstart(load_script, monkeypatch):
    """quickstart/run.py as a module, its siblings importable as they are for the script."""
    monkeypatch.syspath_prepend(str(ROOT / "quickstart"))
    yield load_script("run")
    for name in ("evaluate", "prepare_data", "prepare_model"):
        sys.modules.pop(name, None)


@pytest.fixture
def tiny(quickstart, tmp_path, monkeypatch):
    """The quickstart pointed at a tiny model, a few chats and its own folder."""
    model, data = tmp_path / "cache" / "model", tmp_path / "cache" / "data"
    data.mkdir(parents=True)
    tiny_model("llama_bias").save_pretrained(model)
    byte_tokenizer().save_pretrained(model)
    for name in ("train.jsonl", "held_out.jsonl"):
        data.joinpath(name).write_text("".join(json.dumps({"messages": c}) + "\n" for c in CHATS))
    config = yaml.safe_load((ROOT / "example_configs" / "quickstart.yml").read_text())
    config |= {
        "base_model": str(model),
        "output_dir": str(tmp_path / "output"),
        "dataset_prepared_path": str(tmp_path / "cache" / "prepared"),
        "spft_r": 4,
        "max_steps": 4,
        "save_steps": 2,
        "sequence_len": 128,
        "spft_calibration_batches": 1,
    }
    config["datasets"][0]["path"] = str(data / "train.jsonl")
    path = tmp_path / "quickstart.yml"
    path.write_text(yaml.safe_dump(config))
    monkeypatch.setattr(quickstart, "ROOT", tmp_path)
    monkeypatch.setattr(quickstart, "CONFIG", path)
    monkeypatch.setattr(quickstart, "CACHE", tmp_path / "cache")
    monkeypatch.setattr(quickstart, "OUTPUT", tmp_path / "output")
    monkeypatch.setattr(quickstart, "RESULT", tmp_path / "result.json")
    for module in (quickstart.prepare_model, quickstart.prepare_data):
        monkeypatch.setattr(module, "main", lambda arguments: 0)
    return quickstart


def run_forked(folder: Path, command: list[str], **options) -> CompletedProcess:
    """Run the quickstart's command in a process that need not import everything anew."""
    assert Path(command[0]).name == "axolotl"
    [ended] = forked.run("axolotl_command.py", folder, 1, *command[1:])
    return CompletedProcess(command, ended.code, stderr=ended.stderr)


def test_trains_measures_and_continues_after_an_interruption(tiny, tmp_path, capsys):
    # an interrupted run: one whole checkpoint and one that was being written
    with pytest.MonkeyPatch.context() as patch:
        run = partial(run_forked, tmp_path / "forked")
        patch.setattr(tiny, "subprocess", SimpleNamespace(run=run))
        assert tiny.main(["--max-steps", "2"]) == 0
    (tmp_path / "result.json").unlink()
    half = tmp_path / "output" / "checkpoint-3"
    half.mkdir()
    (half / "adapter_model.safetensors").write_text("half")
    capsys.readouterr()

    assert tiny.main([]) == 0
    assert not half.exists()
    state = json.loads((tmp_path / "output/checkpoint-4/trainer_state.json").read_text())
    assert state["global_step"] == 4
    report = json.loads((tmp_path / "output/spft_report.json").read_text())
    assert report["steps_timed"] == 2  # steps 3 and 4 alone
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["held_out_loss_after"] < result["held_out_loss_before"]
    assert result["trainable_parameters"] == report["trainable_parameters"]
    assert result["optimizer_state_bytes"] > 8 * result["trainable_parameters"]
    for key in ("calibration_seconds", "step_seconds", "peak_memory_bytes"):
        assert result[key] > 0
    for key in ("adapter_path", "report_path"):
        assert (tmp_path / result[key]).exists()
    printed = capsys.readouterr().out
    assert f"{result['held_out_loss_after']:.3f}" in printed
    assert "axolotl inference" in printed


def test_a_finished_run_is_cleared_and_an_unfinished_one_is_not(quickstart, tmp_path):
    output, result = tmp_path / "output", tmp_path / "result.json"
    output.mkdir()
    quickstart.clear_finished_run(output, result)
    assert output.exists()
    result.write_text("{}")
    quickstart.clear_finished_run(output, result)
    assert not output.exists()
    assert not result.exists()


def make_checkpoint(folder: Path, leave_out: str | None = None, state: str = "{}") -> Path:
    folder.mkdir(parents=True)
    for name in ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt"):
        if name != leave_out:
            (folder / name).write_text("x")
    if leave_out != "trainer_state.json":
        (folder / "trainer_state.json").write_text(state)
    return folder


@pytest.mark.parametrize(
    "damage",
    [{"leave_out": n} for n in ("adapter_model.safetensors", "optimizer.pt", "trainer_state.json")]
    + [{"state": '{"global_st'}],
)
def test_half_written_checkpoints_go_and_whole_ones_stay(quickstart, tmp_path, damage):
    whole = make_checkpoint(tmp_path / "output" / "checkpoint-2")
    half = make_checkpoint(tmp_path / "output" / "checkpoint-4", **damage)
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    quickstart.remove_partial_work(tmp_path / "output", prepared)
    assert whole.exists()
    assert not half.exists()
    assert prepared.exists()  # a whole checkpoint shows that the data had been written


def test_data_of_a_run_that_stopped_before_any_checkpoint_is_made_anew(quickstart, tmp_path):
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    quickstart.remove_partial_work(tmp_path / "output", prepared)
    assert prepared.exists()
    (tmp_path / "output").mkdir()
    quickstart.remove_partial_work(tmp_path / "output", prepared)
    assert not prepared.exists()


def test_a_failed_training_is_told_and_leaves_no_result(tiny, tmp_path, capsys):
    config = yaml.safe_load(tiny.CONFIG.read_text())
    tiny.CONFIG.write_text(yaml.safe_dump(config | {"spft_r_pattern": {"q_proj": 9999}}))
    assert tiny.main([]) != 0
    assert "axolotl train ended with exit code" in capsys.readouterr().err
    assert not (tmp_path / "result.json").exists()


def test_labels_are_the_answer_and_its_end_mark(quickstart):
    tokenizer = byte_tokenizer()
    ids, labels = quickstart.evaluate.encode(CHATS[1], tokenizer)
    answer = [token for token in labels if token != -100]
    assert tokenizer.decode(answer) == "twotwo<eos>"
    assert ids[-len(answer) :] == answer
    assert tokenizer.decode(ids).startswith("user: say two<eos>")


def test_batched_loss_equals_one_by_one(quickstart):
    tokenizer, model = byte_tokenizer(), tiny_model().eval()
    total = tokens = 0
    for chat in CHATS[:11]:
        ids, labels = map(torch.tensor, quickstart.evaluate.encode(chat, tokenizer))
        log_probabilities = model(ids[None]).logits[0].log_softmax(-1)
        for position in range(1, len(ids)):
            if labels[position] != -100:
                total -= log_probabilities[position - 1, labels[position]].item()
                tokens += 1
    batches = list(quickstart.evaluate.batches(CHATS[:11], tokenizer))
    summed = sum(quickstart.evaluate.summed_loss(model, batch) for batch in batches)
    assert sum(int((b["labels"][:, 1:] != -100).sum()) for b in batches) == tokens
    assert summed == pytest.approx(total, rel=1e-5)

"""Training options of Axolotl that SPFT must not disturb, nor be disturbed by.

Invariants: activation checkpointing changes neither losses nor selection; accumulation is LoRA's;
early stopping ends with the best checkpoint's adapter; streams train like files.
"""

from __future__ import annotations

import json
import random

import pytest
import torch
from axolotl_runs import (
    adapter_tensors,
    layers_of,
    lora_yaml,
    loss_of_step,
    same_batches,
    same_tensors,
    spft_yaml,
    train,
    with_evaluation,
)


def _index(run) -> dict[str, list[int]]:
    return {name: layer["index"].tolist() for name, layer in layers_of(run.tensors).items()}


@pytest.fixture
def plain(assets, tmp_path):
    return train(spft_yaml(assets, max_steps=4), tmp_path / "plain")


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_changes_nothing(assets, tmp_path, plain, reentrant):
    keys = {"gradient_checkpointing": True}
    keys["gradient_checkpointing_kwargs"] = {"use_reentrant": reentrant}
    forwards = []

    def count(trainer):
        block = trainer.model.base_model.model.model.layers[0]
        # before the forward: recomputation ends as soon as it has what it needs
        block.mlp.register_forward_pre_hook(lambda *_: forwards.append(1))

    run = train(spft_yaml(assets, max_steps=4, **keys), tmp_path / "out", count)
    assert run.losses == pytest.approx(plain.losses, abs=1e-6)
    assert _index(run) == _index(plain)
    for name, tensor in plain.tensors.items():
        torch.testing.assert_close(run.tensors[name], tensor, atol=1e-6, rtol=1e-5)
    # 4 training and 2 calibration batches, each forward run again for its backward
    assert len(forwards) == 2 * (4 + 2)


def test_gradient_accumulation_is_that_of_lora(assets, tmp_path):
    """The first loss, which is the base model's: both adapters are the identity then."""
    keys = {"gradient_accumulation_steps": 2, "micro_batch_size": 2, "max_steps": 2}
    spft = train(spft_yaml(assets, **keys), tmp_path / "spft")
    lora = train(lora_yaml(assets, **keys, lora_dropout=0.0), tmp_path / "lora")
    assert same_batches(spft.batches, lora.batches)
    assert len(spft.batches) == 4
    expected = float(loss_of_step(assets.base_model(), spft.batches[:2]).detach())
    assert spft.losses[0] == lora.losses[0] == pytest.approx(expected, abs=1e-5)


def test_sample_packing_trains_on_separate_conversations(assets, tmp_path):
    """The first loss is the base model's, over the conversations of the pack one at a time."""
    keys = {"sample_packing": True, "micro_batch_size": 1, "max_steps": 6, "learning_rate": 0.1}
    run = train(spft_yaml(assets, **keys), tmp_path / "out")
    assert run.losses[-1] < run.losses[0] - 0.3

    pack, model = {name: tensor[0] for name, tensor in run.batches[0].items()}, assets.base_model()
    starts = (pack["position_ids"] == 0).nonzero().flatten().tolist()
    assert len(starts) > 2, "nothing was packed"
    total, count = 0.0, 0
    for start, end in zip(starts, [*starts[1:], None], strict=True):
        labels = pack["labels"][start:end][None]
        tokens = int((labels[:, 1:] != -100).sum())
        if tokens:
            loss = model(input_ids=pack["input_ids"][start:end][None], labels=labels).loss
            total, count = total + float(loss.detach()) * tokens, count + tokens
    assert run.losses[0] == pytest.approx(total / count, abs=1e-5)


def test_bf16_keeps_rows_in_fp32(assets, tmp_path):
    config = spft_yaml(assets, base_model=str(assets.model_bf16), bf16=True, learning_rate=0.1)
    run = train(config, tmp_path / "out")
    base = run.trainer.model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
    assert base.dtype == torch.bfloat16
    dtypes = {layer["weight"].dtype for layer in layers_of(run.tensors).values()}
    assert dtypes == {torch.float32}
    assert run.losses[-1] < run.losses[0]


@pytest.fixture
def held_out_of_another_kind(assets, tmp_path):
    """Rows whose loss first falls and then rises while training on the training rows."""
    rng = random.Random(0)
    rows = []
    for _ in range(8):
        answer = "".join(rng.choice("abcdefghijklmnopqrstuvwxyz ") for _ in range(12))
        messages = [{"role": "user", "content": "say"}, {"role": "assistant", "content": answer}]
        rows.append(json.dumps({"messages": messages}) + "\n")
    path = tmp_path / "held.jsonl"
    path.write_text("".join(rows))
    return path


def test_early_stopping_leaves_the_best_adapter(assets, tmp_path, held_out_of_another_kind):
    keys = {
        "max_steps": 40,
        "learning_rate": 0.3,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "steps",
        "save_steps": 1,
        "save_total_limit": 3,
        "early_stopping_patience": 2,
        "load_best_model_at_end": True,
        "metric_for_best_model": "eval_loss",
        "greater_is_better": False,
    }
    config = with_evaluation(assets, **keys)
    config["test_datasets"][0]["path"] = str(held_out_of_another_kind)
    run = train(spft_yaml(assets, **config), tmp_path / "out")

    losses = run.eval_losses[1:]  # the first is from before step 1
    best = losses.index(min(losses)) + 1
    assert 1 < best == len(losses) - 2, "the held-out loss did not rise twice"
    assert len(run.batches) == best + 2 < 40
    assert run.trainer.state.best_model_checkpoint == str(run.out / f"checkpoint-{best}")
    assert same_tensors(run.tensors, adapter_tensors(run.out / f"checkpoint-{best}"))
    assert not same_tensors(run.tensors, adapter_tensors(run.out / f"checkpoint-{best + 2}"))

    report = json.loads((run.out / "spft_report.json").read_text())
    assert [loss for _, loss in report["held_out_loss"]] == run.eval_losses
    assert {n: layer["selected"] for n, layer in report["layers"].items()} == _index(run)


def test_streaming_dataset_trains(assets, tmp_path):
    """`streaming: true` reads the same rows without preparing them."""
    keys = {"streaming": True, "dataset_prepared_path": None, "max_steps": 14}
    run = train(spft_yaml(assets, **keys, learning_rate=0.1), tmp_path / "out")
    assert len(run.batches) == 14  # 12 are one pass over the 48 rows
    assert min(run.losses[-3:]) < run.losses[0] - 0.3
    assert run.calibration


@pytest.mark.parametrize("packing", [False, True])
def test_pretraining_stream_trains(assets, tmp_path, packing):
    source = {"path": "json", "data_files": [str(assets.text)], "type": "pretrain"}
    keys = {
        "datasets": None,
        "dataset_prepared_path": None,
        "streaming": True,
        "pretraining_dataset": [{**source, "split": "train"}],
        "sample_packing": packing,
        "micro_batch_size": 1 if packing else 4,
        "max_steps": 6,
        "learning_rate": 0.1,
    }
    run = train(spft_yaml(assets, **keys), tmp_path / "out")
    assert len(run.batches) == 6
    assert run.losses[-1] < run.losses[0] - 0.3

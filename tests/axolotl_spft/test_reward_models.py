"""`reward_model` and `process_reward_model` with `adapter: prune_spft`.

Invariants: the neurons are selected by the reward loss on its first batches; the loss of a later
step is the formula's, of the model that the checkpoint before it loads as; the head is trained
whole and saved with the adapter.
"""

from __future__ import annotations

import pytest
import torch
from axolotl_runs import layers_of, pair, same_batches, spft_yaml, train, write_rows
from peft import PeftModel
from torch.nn.functional import cross_entropy, logsigmoid
from transformers import AutoModelForSequenceClassification, AutoModelForTokenClassification

RUN = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "remove_unused_columns": False}


def _stepwise(i: int) -> dict:
    answers = pair(i)
    completions = [answers["chosen"], answers["rejected"]]
    return {"prompt": answers["prompt"], "completions": completions, "labels": [True, i % 2 == 0]}


def _judged(i: int) -> dict:
    answers = pair(i)
    return {"system": "", "input": answers["prompt"], **answers}


def _ranking_loss(model, batch) -> torch.Tensor:
    chosen, rejected = model(**batch).logits[:, 0].chunk(2)
    return -logsigmoid(chosen - rejected).mean()


def _step_loss(model, batch) -> torch.Tensor:
    labels = batch.pop("labels")
    return cross_entropy(model(**batch).logits.flatten(0, 1), labels.flatten())


CASES = {
    "reward_model": (AutoModelForSequenceClassification, 1, _judged, _ranking_loss),
    "process_reward_model": (AutoModelForTokenClassification, 2, _stepwise, _step_loss),
}
TYPES = {
    "reward_model": "bradley_terry.chat_template",
    "process_reward_model": "stepwise_supervised",
}


@pytest.mark.parametrize("key", CASES)
def test_a_reward_model_is_trained(assets, tmp_path, key):
    kind, labels, row, formula = CASES[key]
    write_rows(tmp_path / "rows.jsonl", map(row, range(48)))
    # with a head of its own, so that what is loaded again has the same
    base = kind.from_pretrained(assets.model, num_labels=labels)
    base.save_pretrained(tmp_path / "base")
    rows = {"path": str(tmp_path / "rows.jsonl"), "split": "train", "type": TYPES[key]}
    config = spft_yaml(
        assets,
        **RUN,
        **{key: True, "model_type": kind.__name__, "num_labels": labels, "datasets": [rows]},
        tokenizer_config=str(assets.model),
        base_model=str(tmp_path / "base"),
    )
    run = train(config, tmp_path / "out")

    assert same_batches(run.calibration, run.batches[:2])
    layers = layers_of(run.tensors)
    assert len(layers) == 14
    assert all(layer["weight"].any() for layer in layers.values())
    head = run.tensors["base_model.model.score.weight"]
    assert not torch.equal(head, base.score.weight)

    model = PeftModel.from_pretrained(
        kind.from_pretrained(tmp_path / "base", num_labels=labels), run.out / "checkpoint-2"
    )
    batch = {k: v for k, v in run.batches[2].items() if isinstance(v, torch.Tensor)}
    with torch.no_grad():
        assert run.step_losses[2] == pytest.approx(float(formula(model.eval(), batch)), rel=1e-5)

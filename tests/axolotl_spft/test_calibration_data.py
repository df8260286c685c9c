"""Calibration takes nothing from training: the same batches, in the same order, the same noise.

Invariants: a run that calibrates trains on exactly the batches that a run without calibration
trains on, calibration sees the first of them, and the first loss (delta is zero) is equal bit for
bit even with dropout and NEFTune noise. The scores are those of dense autograd on these batches.
"""

from __future__ import annotations

import importlib.metadata

import pytest
import torch
from axolotl_runs import layers_of, loss_of_step, same_batches, spft_yaml, train
from packaging.version import Version
from safetensors.torch import load_file

PRETRAINING = {
    "datasets": None,
    "dataset_prepared_path": None,
    "streaming": True,
    "pretraining_dataset": [{"path": "json", "type": "pretrain", "split": "train"}],
}
NOISE = {"overrides_of_model_config": {"attention_dropout": 0.2}, "neftune_noise_alpha": 5}
CASES = {
    "padded": {},
    "packed": {"sample_packing": True, "micro_batch_size": 1},
    "accumulated": {"gradient_accumulation_steps": 2, "micro_batch_size": 2},
    "workers": {"dataloader_num_workers": 2},
    "two epochs": {"micro_batch_size": 24, "max_steps": None, "num_epochs": 2},
    "streaming": {"streaming": True, "dataset_prepared_path": None},
    "pretraining": PRETRAINING,
    "pretraining packed": {**PRETRAINING, "sample_packing": True, "micro_batch_size": 1},
    "length groups": {"group_by_length": True},
    "curriculum": {"curriculum_sampling": True},
    "balanced": {"balance_labels": True, "gradient_accumulation_steps": 2, "micro_batch_size": 2},
}
if Version(importlib.metadata.version("axolotl")) < Version("0.21"):
    del CASES["balanced"]  # a key of 0.21


@pytest.mark.parametrize("case", CASES)
def test_training_sees_the_same_batches_with_and_without_calibration(assets, tmp_path, case):
    keys = {"max_steps": 4, **NOISE, **CASES[case]}
    if "pretraining_dataset" in keys:
        source = {**keys["pretraining_dataset"][0], "data_files": [str(assets.text)]}
        keys["pretraining_dataset"] = [source]

    plain = train(spft_yaml(assets, **keys, spft_importance="magnitude"), tmp_path / "plain")
    calibrated = train(spft_yaml(assets, **keys), tmp_path / "calibrated")

    assert plain.calibration == []
    assert same_batches(calibrated.batches, plain.batches)
    assert len(plain.batches) == 4 * keys.get("gradient_accumulation_steps", 1)
    seen = 2 * keys.get("gradient_accumulation_steps", 1)
    assert same_batches(calibrated.calibration, plain.batches[:seen])
    assert calibrated.step_losses[0] == plain.step_losses[0]
    selections = [run.tensors for run in (plain, calibrated)]
    assert any(
        not torch.equal(selections[0][name], selections[1][name])
        for name in selections[0]
        if name.endswith("index")
    ), "both metrics chose the same neurons: the comparison proves nothing"


def test_batches_differ_from_step_to_step_and_from_seed_to_seed(assets, tmp_path):
    """Guards the test above: its recordings can tell batches apart."""
    runs = [train(spft_yaml(assets, seed=seed), tmp_path / str(seed)) for seed in (1, 2)]
    assert not same_batches(runs[0].batches[:1], runs[0].batches[1:])
    assert not same_batches(runs[0].batches, runs[1].batches)


@pytest.mark.parametrize("case", ["padded", "packed", "accumulated"])
def test_scores_are_those_of_plain_autograd_on_these_batches(assets, tmp_path, case):
    """|sum_j w_ij * mean gradient_ij|, from dense gradients of the base model alone."""
    run = train(spft_yaml(assets, max_steps=2, **CASES[case]), tmp_path / "out")
    scores = load_file(run.out / "spft_importance.safetensors")

    model = assets.base_model().train()
    weights = {name: model.get_submodule(name).weight for name in scores}
    size = CASES[case].get("gradient_accumulation_steps", 1)
    steps = [run.calibration[i : i + size] for i in range(0, len(run.calibration), size)]
    gradients = torch.autograd.grad(
        torch.stack([loss_of_step(model, step) for step in steps]).mean(),
        list(weights.values()),
    )
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        expected = (weight * gradient).sum(dim=1).abs().double()
        torch.testing.assert_close(scores[name], expected, rtol=1e-3, atol=1e-7)
        top = expected.topk(4).indices.sort().values
        assert torch.equal(layers_of(run.tensors)[name]["index"], top)

"""`optimizer` in the YAML: the four AdamWs of torch and bitsandbytes are SelectedNeuronAdamW's, in
Axolotl's own parameter groups; other names are the optimizers that they were."""

from __future__ import annotations

import pytest
import torch
from axolotl_runs import spft_yaml, train

from trainer_ext import SelectedNeuronAdamW, SpftError


def inner(run):
    """The trainer's optimizer without accelerate's wrapper."""
    return run.trainer.optimizer.optimizer


@pytest.mark.parametrize(
    ("name", "state_bits", "fused"),
    [
        ("adamw_torch", 32, None),
        ("adamw_torch_fused", 32, True),
        ("adamw_8bit", 8, None),
        ("adamw_bnb_8bit", 8, None),
    ],
)
def test_adamw_is_ours(assets, tmp_path, name, state_bits, fused):
    keys = {"optimizer": name, "adam_beta2": 0.98, "weight_decay": 0.1, "max_steps": 3}
    run = train(spft_yaml(assets, **keys, learning_rate=0.1), tmp_path / "out")
    optimizer = inner(run)
    assert type(optimizer) is SelectedNeuronAdamW
    group = optimizer.param_groups[0]
    assert (group["state_bits"], group["fused"]) == (state_bits, fused)
    assert (group["betas"][1], group["weight_decay"], group["seed"]) == (0.98, 0.1, 42)
    assert run.losses[-1] < run.losses[0]


def test_8bit_moments_are_8bit(assets, tmp_path):
    """Of a tensor of 4096 elements or more: the embedding, as the tiny deltas have fewer."""
    keys = {"optimizer": "adamw_bnb_8bit", "lora_modules_to_save": ["embed_tokens"]}
    run = train(spft_yaml(assets, **keys), tmp_path / "out")
    for parameter, state in inner(run).state.items():
        large = parameter.numel() >= 4096
        assert state["exp_avg"].dtype == (torch.uint8 if large else torch.float32)
    assert any(p.numel() >= 4096 for p in inner(run).state)


@pytest.mark.parametrize("name", ["adafactor", "sgd", "paged_adamw_8bit", "adopt_adamw"])
def test_other_names_are_left_alone(assets, tmp_path, name):
    run = train(spft_yaml(assets, optimizer=name), tmp_path / "out")
    assert not isinstance(inner(run), SelectedNeuronAdamW)


def test_learning_rates_of_their_own_are_axolotls(assets, tmp_path):
    """embedding_lr makes Axolotl deal the parameters to its own groups."""
    keys = {"embedding_lr": 0.003, "lora_modules_to_save": ["embed_tokens"], "weight_decay": 0.1}
    run = train(spft_yaml(assets, **keys), tmp_path / "out")
    optimizer = inner(run)
    assert type(optimizer) is SelectedNeuronAdamW
    rates = {group["lr"]: group["weight_decay"] for group in optimizer.param_groups}
    assert rates == {0.01: 0.1, 0.003: 0.0}


def test_optim_args_reach_it(assets, tmp_path):
    keys = {"optim_args": {"stochastic_rounding": False, "eps": 1e-5}}
    run = train(spft_yaml(assets, **keys), tmp_path / "out")
    group = inner(run).param_groups[0]
    assert (group["stochastic_rounding"], group["eps"]) == (False, 1e-5)


def test_a_bad_optim_arg_is_told_in_one_line(assets, tmp_path):
    with pytest.raises(SpftError, match="optim_args holds 'momentum=0"):
        train(spft_yaml(assets, optim_args="momentum=0.9"), tmp_path / "out")

"""A trainer whose arguments name a torch or bitsandbytes AdamW trains by SelectedNeuronAdamW, with
the groups and hyperparameters that it would have had; under any other name, with an optimizer of
its own, or where something besides SPFT's parameters is trained, it keeps its own."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from accelerate.utils.deepspeed import HfDeepSpeedConfig
from adapters import wrapped
from optimizers import same_bits, state_of
from tiny_models import dataset, tiny_model
from torch import nn
from transformers import Trainer, TrainingArguments

from trainer_ext import SelectedNeuronAdamW, SpftCallback, SpftConfig, SpftError, SpftTrainer
from trainer_ext.optim import selected_neuron_optimizer

NAMES = {
    "adamw_torch": (32, None),
    "adamw_torch_fused": (32, True),
    "adamw_8bit": (8, None),
    "adamw_bnb_8bit": (8, None),
}


def arguments(folder, **more) -> TrainingArguments:
    return TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": 2,
            "per_device_train_batch_size": 4,
            "learning_rate": 1e-2,
            "weight_decay": 0.1,
            "adam_beta2": 0.98,
            "adam_epsilon": 1e-6,
            "logging_steps": 1,
            "report_to": [],
            "use_cpu": True,
            "save_strategy": "no",
            "disable_tqdm": True,
            "seed": 11,
            **more,
        }
    )


def trainer(folder, model=None, config=None, **more):
    options = {"optim": "adamw_torch", **more}
    return SpftTrainer(
        model or tiny_model("llama_bias"),
        arguments(folder, **options),
        train_dataset=dataset(),
        spft_config=config or SpftConfig(r=4, importance="magnitude"),
    )


def inner(run):
    """The trainer's optimizer without accelerate's wrapper."""
    return getattr(run.optimizer, "optimizer", run.optimizer)


@pytest.mark.parametrize("name", NAMES)
def test_the_four_names_are_trained_by_ours(tmp_path, name):
    run = trainer(tmp_path, optim=name)
    run.train()
    optimizer = inner(run)
    assert type(optimizer) is SelectedNeuronAdamW
    assert {(g["state_bits"], g["fused"]) for g in optimizer.param_groups} == {NAMES[name]}
    group = optimizer.param_groups[0]
    expected = {"betas": (0.9, 0.98), "eps": 1e-6, "weight_decay": 0.1, "seed": 11}
    assert {key: group[key] for key in expected} == expected
    assert group["initial_lr"] == 1e-2
    assert len(optimizer.state) == len(group["params"]) > 0


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("adafactor", "Adafactor"),
        ("sgd", "SGD"),
        ("lion_32bit", "Lion"),
        ("paged_adamw_8bit", "AdamW"),
    ],
)
def test_other_names_are_what_they_were(tmp_path, name, kind):
    run = trainer(tmp_path, optim=name)
    assert selected_neuron_optimizer(run.args) is None
    optimizer = run.create_optimizer()
    assert type(optimizer).__name__ == kind


def test_it_trains_as_torch_does(tmp_path):
    """Losses and weights of the same run with torch's fused AdamW, bit for bit."""
    runs = []
    for own in (None, torch.optim.AdamW):
        run = trainer(tmp_path, max_steps=4)
        if own is not None:
            options = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-6, "fused": True}
            run.optimizer_cls_and_kwargs = (own, options)
        run.train()
        assert type(inner(run)) is (own or SelectedNeuronAdamW)
        runs.append(run)
    losses = [[e["loss"] for e in r.state.log_history if "loss" in e] for r in runs]
    assert losses[0] == losses[1]
    assert same_bits(*([p for p in r.model.parameters() if p.requires_grad] for r in runs))


def test_modules_to_save_are_trained_too(tmp_path):
    config = SpftConfig(
        r=4, importance="magnitude", modules_to_save=["lm_head", "norm"], task_type="CAUSAL_LM"
    )
    run = trainer(tmp_path, config=config)
    head = run.model.base_model.model.lm_head.modules_to_save["default"].weight
    before = head.detach().clone()
    run.train()
    optimizer = inner(run)
    assert type(optimizer) is SelectedNeuronAdamW
    assert not torch.equal(head, before)
    assert head in optimizer.state
    # transformers' groups: no decay on norms (peft saves all whose names end like that)
    decayed, other = optimizer.param_groups
    norm = run.model.base_model.model.model.norm.modules_to_save["default"].weight
    assert (decayed["weight_decay"], other["weight_decay"]) == (0.1, 0.0)
    assert any(p is norm for p in other["params"])
    assert {p.ndim for p in other["params"]} == {1}
    assert {p.ndim for p in decayed["params"]} == {2}


@pytest.mark.parametrize("modules", [None, ["lm_head"]])
def test_a_model_that_is_made_when_training_begins(tmp_path, modules):
    run = Trainer(
        args=arguments(tmp_path, optim="adamw_torch_fused"),
        model_init=lambda: wrapped("llama_bias", importance="magnitude", modules_to_save=modules),
        train_dataset=dataset(),
    )
    run.add_callback(SpftCallback(run))
    for _ in range(2):
        run.train()
        optimizer = inner(run)
        assert type(optimizer) is SelectedNeuronAdamW
        trained = {p for p in run.model.parameters() if p.requires_grad}
        assert set(optimizer.state) == trained


@pytest.mark.parametrize("name", ["adamw_torch", "adamw_8bit"])
def test_resuming_is_bit_exact(tmp_path, name):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4, "optim": name}
    config = {"r": 160, "importance": "magnitude", "target_modules": ["lm_head"]}  # 160 x 32 > 4096
    whole = trainer(tmp_path, config=SpftConfig(**config), **options)
    whole.train()
    resumed = trainer(tmp_path, config=SpftConfig(**config), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 4
    assert same_bits(whole.model.parameters(), resumed.model.parameters())
    assert same_bits(state_of(inner(whole)), state_of(inner(resumed)))
    moments = {state["exp_avg"].dtype for state in state_of(inner(resumed))}
    assert moments == {torch.uint8 if name == "adamw_8bit" else torch.float32}


def test_a_checkpoint_of_torchs_adamw_goes_on(tmp_path):
    options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    before = trainer(tmp_path, **options)
    kwargs = {"lr": 1e-2, "betas": (0.9, 0.98), "eps": 1e-6, "fused": True}
    before.optimizer_cls_and_kwargs = (torch.optim.AdamW, kwargs)
    before.train()
    resumed = trainer(tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert type(inner(resumed)) is SelectedNeuronAdamW
    assert same_bits(before.model.parameters(), resumed.model.parameters())


def test_a_trainers_own_optimizer_stays(tmp_path):
    run = trainer(tmp_path)
    own = torch.optim.SGD([p for p in run.model.parameters() if p.requires_grad], lr=0.1)
    run.optimizer = own
    assert run.create_optimizer() is own


def test_parameters_of_others_keep_the_named_optimizer(tmp_path, caplog):
    run = trainer(tmp_path)
    run.model.base_model.model.model.norm.weight.requires_grad_(True)
    assert type(run.create_optimizer()) is torch.optim.AdamW
    assert "norm.weight is trained but is no parameter of SPFT" in caplog.text


def test_a_model_without_an_adapter_keeps_the_named_optimizer(tmp_path):
    run = Trainer(nn.Linear(2, 2), arguments(tmp_path, optim="adamw_torch"))
    SpftCallback(run)
    assert type(run.create_optimizer()) is torch.optim.AdamW


@pytest.mark.parametrize(
    ("offload", "force", "ours"),
    [
        ("cpu", {"zero_force_ds_cpu_optimizer": True}, False),
        ("cpu", {"zero_force_ds_cpu_optimizer": False}, True),
        ("cpu", {}, True),
        ("none", {"zero_force_ds_cpu_optimizer": True}, True),
        (None, {}, True),
    ],
)
def test_deepspeeds_own_cpu_optimizer_steps_only_where_it_is_asked_for(
    tmp_path, monkeypatch, offload, force, ours
):
    run = trainer(tmp_path)
    zero = {"stage": 2} | ({"offload_optimizer": {"device": offload}} if offload else {})
    config = HfDeepSpeedConfig({"zero_optimization": zero, **force})
    plugin = SimpleNamespace(hf_ds_config=config)
    monkeypatch.setattr(type(run.accelerator.state), "deepspeed_plugin", plugin, raising=False)
    run.is_deepspeed_enabled = True
    kind = SelectedNeuronAdamW if ours else torch.optim.AdamW
    assert run.get_optimizer_cls_and_kwargs(run.args, run.model)[0] is kind
    if offload == "cpu":  # else DeepSpeed would refuse it
        assert config.config["zero_force_ds_cpu_optimizer"] is not ours


def test_optim_args_are_honoured(tmp_path):
    text = "beta1=0.5, eps=1e-4,stochastic_rounding=False,seed=3,foreach=true"
    kind, kwargs = selected_neuron_optimizer(
        arguments(tmp_path, optim="adamw_torch_fused", optim_args=text)
    )
    assert kind is SelectedNeuronAdamW
    assert kwargs == {
        "lr": 1e-2,
        "betas": (0.5, 0.98),
        "eps": 1e-4,
        "seed": 3,
        "fused": None,
        "foreach": True,
        "stochastic_rounding": False,
    }
    args = arguments(tmp_path, optim="adamw_torch", optim_args="state_bits=8")
    assert selected_neuron_optimizer(args)[1]["state_bits"] == 8


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("momentum=0.9", ["'momentum=0.9'", "beta1", "stochastic_rounding"]),
        ("beta1", ["'beta1'", "name=value"]),
        ("beta1=high", ["'beta1=high'", "a number"]),
        ("fused=maybe", ["'fused=maybe'", "true or false"]),
        ("weight_decay=0.1", ["weight decay have fields of their own"]),
        ("state_bits=4", ["state_bits is 4", "8 or 32"]),
        ("foreach=1,fused=1", ["foreach and fused"]),
    ],
)
def test_bad_optim_args_are_told_in_one_line(tmp_path, text, words):
    run = trainer(tmp_path, optim_args=text)
    with pytest.raises(SpftError) as caught:
        run.create_optimizer()
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_8bit_without_bitsandbytes(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.delitem(sys.modules, "bitsandbytes.functional", raising=False)
    with pytest.raises(SpftError, match="pip install bitsandbytes"):
        trainer(tmp_path, optim="adamw_8bit").create_optimizer()

"""Putting an adapter in changes no configuration that the caller holds: the model has a copy. Only
the very object that the model holds for one adapter makes another its copy."""

from __future__ import annotations

import copy

import pytest
import torch
from adapters import trained, wrapped
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from tiny_models import tiny_model
from transformers import (
    LlamaForCausalLM,
    LlamaForQuestionAnswering,
    LlamaForSequenceClassification,
    LlamaForTokenClassification,
)

from trainer_ext import SpftConfig, measure_importance, select_neurons
from trainer_ext.tuner.model import default_task_type, deltas, is_selected


@pytest.mark.parametrize("kind", ["default", "global", "patterns", "start"])
def test_the_callers_configuration_stays_what_it_was(tmp_path, kind):
    fields = {"r": 4, "importance": "magnitude"}
    if kind == "global":
        measure_importance(wrapped(importance="magnitude")).save(tmp_path / "scores")
        fields |= {"allocation": "global", "importance_file": str(tmp_path / "scores")}
    elif kind == "patterns":
        fields |= {"r_pattern": {"q_proj": 3}, "target_modules": "all-linear"}
    elif kind == "start":
        trained().save_pretrained(tmp_path)
        fields = {"start_adapter": str(tmp_path)}
    config = SpftConfig(task_type="CAUSAL_LM", **fields)
    before = copy.deepcopy(config).to_dict()
    model = get_peft_model(tiny_model(), config)
    # PEFT itself writes down the base's name, if it has one
    before["base_model_name_or_path"] = config.base_model_name_or_path
    assert config.to_dict() == before
    held = model.peft_config["default"]
    assert held is not config
    assert isinstance(held.target_modules, list)
    assert held.anchor in ("none", "adapter")
    assert (held.allocated is not None) == (kind == "global")


def test_the_models_own_object_makes_a_copy_of_the_adapter():
    model = trained()
    model.add_adapter("ref", model.peft_config["default"])
    for name, delta in deltas(model).items():
        assert torch.equal(deltas(model, "ref")[name].index, delta.index)
    assert is_selected(model, "ref")


def test_equal_configurations_are_adapters_of_their_own():
    model = trained()
    model.add_adapter("equal", copy.deepcopy(model.peft_config["default"]))
    config = SpftConfig(r=4, importance="random", seed=3)
    for name in ("first", "second"):
        model.add_adapter(name, config)
    assert not any(is_selected(model, name) for name in ("equal", "first", "second"))
    select_neurons(model, adapter_name="first")
    assert is_selected(model, "first")
    assert not is_selected(model, "second")


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        (LlamaForCausalLM, None),
        (LlamaForSequenceClassification, "score"),
        (LlamaForTokenClassification, "score"),
        (LlamaForQuestionAnswering, "qa_outputs"),
    ],
)
def test_every_kind_of_head_that_peft_trains_whole(tmp_path, kind, head):
    task = {"LlamaForQuestionAnswering": "QUESTION_ANS"}.get(kind.__name__, default_task_type)
    base = kind(tiny_model().config)
    task = task(base) if callable(task) else task
    config = SpftConfig(
        r=4,
        importance="magnitude",
        task_type=task,
        exclude_modules=["qa_outputs"] if task == "QUESTION_ANS" else None,
    )
    model = get_peft_model(base, config)
    select_neurons(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert any(f".{head}.modules_to_save." in name for name in trained) == (head is not None)
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(kind(tiny_model().config), tmp_path)
    for name, tensor in get_peft_model_state_dict(model).items():
        assert torch.equal(get_peft_model_state_dict(loaded)[name], tensor), name


def test_an_r_beyond_a_layer_is_told_once(tmp_path, caplog):
    config = SpftConfig(r=20, r_pattern={"v_proj": 2}, importance="magnitude")
    model = get_peft_model(tiny_model(), config)
    select_neurons(model)
    (line,) = [r.getMessage() for r in caplog.records if "have fewer neurons" in r.getMessage()]
    assert line.startswith("r is 20, and 2 of ")  # k_proj in both blocks; v_proj has its pattern
    model.save_pretrained(tmp_path)
    caplog.clear()
    PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert "have fewer neurons" not in caplog.text


def test_a_copy_is_none_any_more_when_its_original_is_gone():
    model = trained()
    model.add_adapter("ref", model.peft_config["default"])
    assert model.peft_config["ref"].copy_of == "default"
    model.set_adapter("ref")
    model.delete_adapter("default")
    assert model.peft_config["ref"].copy_of is None

"""Putting an adapter in changes no configuration that the caller holds: the model has a copy. Only
the very object that the model holds for one adapter makes another its copy."""

from __future__ import annotations

import copy

import pytest
import torch
from adapters import trained, wrapped
from peft import get_peft_model
from tiny_models import tiny_model

from trainer_ext import SpftConfig, measure_importance, select_neurons
from trainer_ext.tuner.model import deltas, is_selected


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
    # PEFT itself writes down the base's name
    before = {**copy.deepcopy(config).to_dict(), "base_model_name_or_path": ""}
    model = get_peft_model(tiny_model(), config)
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

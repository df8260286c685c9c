"""Numbers of neurons are settled before the layers are made: patterns set single layers, and
`allocation: global` spreads one budget by a file of scores that is read once. The selection takes
exactly the neurons that the budget was spent on, and a saved adapter loads without the file."""

from __future__ import annotations

import pytest
import torch
from adapters import wrapped
from peft import PeftModel, get_peft_model
from tiny_models import dataset, tiny_model
from transformers import TrainingArguments

from trainer_ext import (
    ImportanceScores,
    SpftConfig,
    SpftError,
    SpftTrainer,
    current_selection,
    measure_importance,
    select_neurons,
)
from trainer_ext.tuner.model import deltas, spft_layers


def counts(model, adapter_name="default") -> dict[str, int]:
    return {name: delta.weight.shape[0] for name, delta in deltas(model, adapter_name).items()}


def parameters(model, adapter_name="default") -> int:
    return sum(delta.weight.numel() for delta in deltas(model, adapter_name).values())


@pytest.fixture(params=["llama", "gpt2"])
def case(request, tmp_path):
    """An architecture, and a file of scores that differ from layer to layer."""
    scores = measure_importance(wrapped(request.param, importance="magnitude"))
    for depth, layer_scores in enumerate(scores.scores.values()):
        layer_scores.pow_(1 + depth % 4)  # how much stands out, not how large all are
    scores.save(tmp_path / "scores.safetensors")
    return request.param, tmp_path / "scores.safetensors"


def spread(case, **fields) -> PeftModel:
    architecture, path = case
    fields = {"importance": "magnitude", "allocation": "global", **fields}
    return wrapped(architecture, importance_file=str(path), **fields)


def test_as_many_parameters_as_uniform_but_elsewhere(case):
    model, uniform = spread(case), wrapped(case[0])
    layers = spft_layers(model)
    left = parameters(uniform) - parameters(model)
    assert 0 <= left < max(layer.in_features for layer in layers.values())
    assert len(set(counts(model).values())) > 1
    assert all(1 <= count <= 16 for count in counts(model).values())  # r = 4, the default bounds
    assert model.peft_config["default"].allocated == counts(model)
    assert list(counts(model)) == list(counts(uniform))


def test_what_is_selected_is_what_the_budget_was_spent_on(case):
    """No neuron is left out that gains more than one taken, where the bounds allow the exchange."""
    model = spread(case)
    selection = select_neurons(model)
    scores = ImportanceScores.load(case[1]).scores
    layers, taken, lost = spft_layers(model), {}, {}
    for name, index in selection.index.items():
        values = scores[name] / scores[name].square().mean().sqrt() / layers[name].in_features
        left_out = torch.ones(len(values), dtype=torch.bool)
        left_out[index] = False
        assert values[index].min() >= values[left_out].max()
        if len(index) > 1:  # above its floor
            taken[name] = values[index].min().item()
        if len(index) < 16:
            lost[name] = values[left_out].max().item()
    for name, gain in taken.items():
        cost = layers[name].in_features
        for other, missed in lost.items():
            if layers[other].in_features <= cost:
                assert missed <= gain * (1 + 1e-9)


def test_a_saved_adapter_loads_and_is_continued_without_the_file(case, tmp_path):
    model = spread(case)
    select_neurons(model)
    model.save_pretrained(tmp_path / "adapter")
    case[1].unlink()
    loaded = PeftModel.from_pretrained(tiny_model(case[0]), tmp_path / "adapter", is_trainable=True)
    assert counts(loaded) == counts(model)
    theirs, ours = current_selection(loaded), current_selection(model)
    assert all(torch.equal(theirs.index[name], ours.index[name]) for name in ours.index)


def test_training_with_the_trainer(case, tmp_path):
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=2, learning_rate=0.1, report_to=[], use_cpu=True
    )
    config = SpftConfig(
        r=4, importance="magnitude", allocation="global", importance_file=str(case[1])
    )
    trainer = SpftTrainer(
        tiny_model(case[0]), arguments, train_dataset=dataset(16), spft_config=config
    )
    trainer.train()
    assert counts(trainer.model) == trainer.model.peft_config["default"].allocated
    assert all(bool(d.weight.any()) for d in deltas(trainer.model).values())


def test_patterns_keep_their_number_and_take_no_part_in_the_budget(tmp_path):
    scores = measure_importance(wrapped(importance="magnitude"))
    scores.save(tmp_path / "scores")
    fields = {"r_pattern": {"down_proj": 7}, "density_pattern": {r"layers\.1\.mlp\.up_proj": 0.5}}
    case = ("llama", tmp_path / "scores")
    model, uniform = spread(case, **fields), wrapped(**fields)
    fixed = {name: count for name, count in counts(uniform).items() if count != 4}
    assert fixed == {
        "model.layers.0.mlp.down_proj": 7,
        "model.layers.1.mlp.down_proj": 7,
        "model.layers.1.mlp.up_proj": 24,
    }
    assert {name: counts(model)[name] for name in fixed} == fixed
    allocated = model.peft_config["default"].allocated
    assert set(allocated) == set(counts(model)) - set(fixed)
    # every competing layer has 32 inputs
    assert sum(allocated.values()) == 4 * len(allocated)
    everything = spread(case, r_pattern={".*": 2})
    assert everything.peft_config["default"].allocated == {}
    assert set(counts(everything).values()) == {2}


def test_the_file_is_read_once_for_a_configuration(case):
    model = spread(case)
    before = counts(model)
    case[1].write_text("not needed any more")
    again = get_peft_model(tiny_model(case[0]), model.peft_config["default"])
    assert counts(again) == before


def test_a_second_adapter_has_a_budget_of_its_own(case):
    architecture, path = case
    model = wrapped(architecture)
    config = SpftConfig(
        r=8, target_modules=r".*(mlp|attn).*", allocation="global", importance_file=str(path)
    )
    model.add_adapter("second", config)
    assert set(counts(model).values()) == {4}
    allocated = model.peft_config["second"].allocated
    assert counts(model, "second") == allocated
    assert set(allocated) == set(counts(model))


def test_names_are_those_of_the_base_model_also_in_a_compiled_one(case):
    architecture, path = case
    base = tiny_model(architecture)
    blocks = base.transformer.h if architecture == "gpt2" else base.model.layers
    blocks[0] = torch.compile(blocks[0], backend="eager")
    config = SpftConfig(r=4, allocation="global", importance_file=str(path))
    model = get_peft_model(base, config)
    allocated = model.peft_config["default"].allocated
    assert allocated == counts(model) == counts(spread(case))


def test_a_file_for_other_targets_is_refused_and_nothing_is_filled_in(case):
    architecture, path = case
    config = SpftConfig(
        target_modules=["q_proj", "c_fc"], allocation="global", importance_file=str(path)
    )
    with pytest.raises(SpftError, match=r"importance_file is .*same model and target_modules"):
        get_peft_model(tiny_model(architecture), config)
    assert config.allocated is None

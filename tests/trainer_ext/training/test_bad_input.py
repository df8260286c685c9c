"""Every mistake in Python gets one SpftError of one line that names the key or file, what was seen
and the mend."""

from __future__ import annotations

import pytest
import torch
from adapters import selected, wrapped
from peft import LoraConfig, PeftModel, get_peft_model
from tiny_models import batch, dataset, tiny_model
from transformers import TrainingArguments

from trainer_ext import (
    ImportanceScores,
    NeuronSelection,
    SpftCallback,
    SpftConfig,
    SpftError,
    SpftTrainer,
    apply_selection,
    current_selection,
    select_neurons,
)
from trainer_ext.files.atomic import write_tensors


def train(model, tmp_path, **more):
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True)
    SpftTrainer(model, arguments, train_dataset=dataset(8), **more).train()


def save_scores(tmp_path, scores):
    path = tmp_path / "scores.safetensors"
    ImportanceScores(scores, "group_taylor").save(path)
    return str(path)


def headless_scores(tmp_path):
    path = tmp_path / "scores.safetensors"
    write_tensors(path, {"a": torch.ones(3)}, {"kind": "spft_importance", "axis": "rows"})
    return str(path)


def not_a_scores_file(tmp_path):
    path = tmp_path / "scores.safetensors"
    path.write_text("hello")
    return str(path)


def unsorted_selection():
    layer = next(iter(wrapped().base_model.model.model.layers)).self_attn.q_proj
    layer.spft_delta["default"].select(torch.tensor([3, 1, 2, 0]))


Q_PROJ = "model.layers.0.self_attn.q_proj"

# name -> (what the user does, given tmp_path; what the message must contain)
CASES = {
    "r and density": (lambda p: SpftConfig(r=4, density=0.1), ["r is 4", "density is 0.1", "one"]),
    "r zero": (lambda p: SpftConfig(r=0), ["r is 0", "at least 1"]),
    "r negative": (lambda p: SpftConfig(r=-3), ["r is -3", "at least 1"]),
    "r a string": (lambda p: SpftConfig(r="8"), ["r is '8'", "whole number"]),
    "r true": (lambda p: SpftConfig(r=True), ["r is True", "whole number"]),
    "r a float": (lambda p: SpftConfig(r=1.5), ["r is 1.5", "whole number"]),
    "density zero": (lambda p: SpftConfig(density=0.0), ["density is 0.0", "above 0"]),
    "density above one": (lambda p: SpftConfig(density=1.5), ["density is 1.5", "up to 1"]),
    "density a string": (lambda p: SpftConfig(density="5%"), ["density is '5%'", "0.05"]),
    "unknown importance": (
        lambda p: SpftConfig(importance="tylor"),
        ["importance is 'tylor'", "group_taylor", "magnitude"],
    ),
    "unknown axis": (lambda p: SpftConfig(axis="columns"), ["axis is 'columns'", "rows"]),
    "no calibration batches": (
        lambda p: SpftConfig(calibration_batches=0),
        ["calibration_batches is 0", "at least 1"],
    ),
    "layers_pattern alone": (
        lambda p: SpftConfig(layers_pattern="layers"),
        ["layers_pattern is 'layers'", "layers_to_transform"],
    ),
    "r_pattern a list": (
        lambda p: SpftConfig(r_pattern=["q_proj"]),
        ["r_pattern is ['q_proj']", "a number for each name"],
    ),
    "r_pattern a number": (lambda p: SpftConfig(r_pattern=8), ["r_pattern is 8", "down_proj: 8"]),
    "r_pattern zero": (
        lambda p: SpftConfig(r_pattern={"q_proj": 0}),
        ["'q_proj'", "r_pattern is 0", "at least 1"],
    ),
    "r_pattern a share": (
        lambda p: SpftConfig(r_pattern={"q_proj": 0.5}),
        ["'q_proj'", "r_pattern is 0.5", "whole number"],
    ),
    "r_pattern true": (lambda p: SpftConfig(r_pattern={"q": True}), ["r_pattern is True"]),
    "density_pattern above one": (
        lambda p: SpftConfig(density_pattern={"q_proj": 8}),
        ["'q_proj'", "density_pattern is 8", "up to 1"],
    ),
    "pattern no expression": (
        lambda p: SpftConfig(r_pattern={"(q_proj": 8}),
        ["r_pattern has '(q_proj'", "nor a regular expression", "mend it"],
    ),
    "pattern whole as an ending alone": (
        lambda p: SpftConfig(density_pattern={"a)|(b": 0.5}),
        ["density_pattern has 'a)|(b'", "nor a regular expression"],
    ),
    "pattern broken as an ending": (
        lambda p: SpftConfig(density_pattern={"(?i)q_proj": 0.5}),
        ["density_pattern has '(?i)q_proj'", "nor a regular expression"],
    ),
    "pattern a number": (lambda p: SpftConfig(r_pattern={0: 8}), ["r_pattern has 0", "name"]),
    "both patterns match": (
        lambda p: wrapped(r_pattern={"q_proj": 2}, density_pattern={".*attn.*": 0.5}),
        ["layers.0.self_attn.q_proj", "'q_proj' in r_pattern", "density_pattern", "keep one"],
    ),
    "pattern larger than a layer": (
        lambda p: wrapped(r_pattern={"k_proj": 20}),
        ["r_pattern gives", "self_attn.k_proj 20 neurons", "16", "density_pattern"],
    ),
    "pattern without a layer": (
        lambda p: wrapped(r_pattern={"q_proj": 2, "proj": 2}),
        ["r_pattern has 'proj'", "no targeted layer", "down_proj", "v_proj"],
    ),
    "pattern of a layer that is no target": (
        lambda p: wrapped(target_modules=["q_proj"], density_pattern={"up_proj": 0.1}),
        ["density_pattern has 'up_proj'", "such as q_proj"],
    ),
    "unknown allocation": (
        lambda p: SpftConfig(allocation="globl"),
        ["allocation is 'globl'", "uniform, global"],
    ),
    "allocation_floor zero": (
        lambda p: SpftConfig(allocation_floor=0),
        ["allocation_floor is 0", "above 0"],
    ),
    "allocation_floor above one": (
        lambda p: SpftConfig(allocation_floor=1.5),
        ["allocation_floor is 1.5", "up to 1"],
    ),
    "allocation_ceiling below one": (
        lambda p: SpftConfig(allocation_ceiling=0.5),
        ["allocation_ceiling is 0.5", "at least 1"],
    ),
    "allocation_ceiling a string": (
        lambda p: SpftConfig(allocation_ceiling="4"),
        ["allocation_ceiling is '4'", "number"],
    ),
    "global without scores": (
        lambda p: SpftConfig(allocation="global"),
        ["allocation is 'global'", "importance_file is not set", "spft calibrate CONFIG -o"],
    ),
    "allocated without global": (
        lambda p: SpftConfig(allocated={"a": 1}),
        ["allocated is filled in", "allocation is 'uniform'", "leave allocated out"],
    ),
    "allocated zero": (
        lambda p: SpftConfig(allocation="global", allocated={"a": 0}),
        ["'a'", "allocated is 0", "at least 1"],
    ),
    "allocated for another model": (
        lambda p: wrapped(allocation="global", allocated={"a": 1}),
        ["allocated has no neurons", "model.layers.0.self_attn.q_proj", "fresh SpftConfig"],
    ),
    "global with no file there": (
        lambda p: wrapped(allocation="global", importance_file=str(p / "none")),
        ["importance_file is", "none does not exist"],
    ),
    "global with scores of another model": (
        lambda p: wrapped(
            allocation="global", importance_file=save_scores(p, {"a": torch.ones(3)})
        ),
        ["importance_file is", "the file has 1 layers", "first a", "same model"],
    ),
    "global with scores that are not finite": (
        lambda p: wrapped(
            target_modules=[Q_PROJ],
            allocation="global",
            importance_file=save_scores(p, {Q_PROJ: torch.ones(32) / torch.arange(32)}),
        ),
        ["importance_file is", f"layer {Q_PROJ}: 1 of 32", "NaN or infinite"],
    ),
    "a pattern's r larger than a layer": (
        lambda p: wrapped(r_pattern={"k_proj": 20}),
        ["r_pattern gives layer", "model.layers.0.self_attn.k_proj", "20 neurons", "at most 16"],
    ),
    "tied head as target": (
        lambda p: wrapped(target_modules=["lm_head"]),
        ["lm_head", "tied", "tie_word_embeddings=False"],
    ),
    "embedding as target": (
        lambda p: wrapped(target_modules=["embed_tokens"]),
        ["model.embed_tokens", "Embedding", "exclude_modules"],
    ),
    "pattern without linear layers": (
        lambda p: wrapped(target_modules=r".*layernorm"),
        ["no linear layer", "target_modules"],
    ),
    "training before selection": (
        lambda p: wrapped().train()(**batch()),
        ["before its neurons are selected", "select_neurons"],
    ),
    "data-driven importance without data": (
        lambda p: select_neurons(wrapped(importance="group_taylor")),
        ["group_taylor", "no batch", "magnitude"],
    ),
    "no such adapter": (
        lambda p: select_neurons(selected(), adapter_name="other"),
        ["other"],
    ),
    "trainer without an adapter": (
        lambda p: train(tiny_model(), p),
        ["0 active SPFT adapters", "spft_config"],
    ),
    "trainer with a LoRA model": (
        lambda p: train(get_peft_model(tiny_model(), LoraConfig(target_modules=["q_proj"])), p),
        ["0 active SPFT adapters", "SpftConfig"],
    ),
    "an adapter loaded for inference": (
        lambda p: train(reloaded(p), p),
        ["'default' is frozen", "is_trainable=True"],
    ),
    "spft_config for a PEFT model": (
        lambda p: train(wrapped(), p, spft_config=SpftConfig(r=2)),
        ["spft_config", "PEFT model already", "leave spft_config out"],
    ),
    "spft_config without a model": (
        lambda p: train(None, p, spft_config=SpftConfig(r=2)),
        ["model = None", "model_init", "get_peft_model"],
    ),
    "scores without a header": (
        lambda p: select_neurons(wrapped(importance_file=headless_scores(p))),
        ["importance_file", "no valid header", "metric"],
    ),
    "no importance file": (
        lambda p: select_neurons(wrapped(importance_file=str(p / "none"))),
        ["none does not exist", "spft_importance"],
    ),
    "damaged importance file": (
        lambda p: select_neurons(wrapped(importance_file=not_a_scores_file(p))),
        ["scores.safetensors", "not a whole safetensors file", "make it anew"],
    ),
    "importance file of another model": (
        lambda p: select_neurons(wrapped(importance_file=save_scores(p, {"a": torch.ones(3)}))),
        ["1 layers", "first a", "same model"],
    ),
    "selection file of another kind": (
        lambda p: NeuronSelection.load(save_scores(p, {"a": torch.ones(3)})),
        ["spft_importance", "spft_selection", "check the path"],
    ),
    "selection not ascending": (lambda p: unsorted_selection(), ["distinct", "ascending"]),
    "selection beyond the layer": (
        lambda p: apply_selection(wrapped(), beyond()),
        ["neuron 32", "q_proj", "32 neurons", "select anew"],
    ),
    "quantised layer": (
        lambda p: get_peft_model(Quantised(), SpftConfig(r=2, target_modules=["linear"])),
        ["layer linear", "int8", "bf16"],
    ),
    "merging broken values": (
        lambda p: broken().merge_and_unload(safe_merge=True),
        ["'default'", "non-finite", "earlier checkpoint"],
    ),
}


def beyond() -> NeuronSelection:
    selection = current_selection(selected())
    selection.index["model.layers.0.self_attn.q_proj"] = torch.tensor([1, 2, 3, 32])
    return selection


class Quantised(torch.nn.Module):
    """A linear layer with int8 weights, as bitsandbytes has them."""

    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(4, 4)
        weight = torch.zeros(4, 4, dtype=torch.int8)
        self.linear.weight = torch.nn.Parameter(weight, requires_grad=False)


def reloaded(folder) -> PeftModel:
    selected().save_pretrained(folder / "adapter")
    return PeftModel.from_pretrained(tiny_model(), folder / "adapter")


def broken() -> PeftModel:
    model = selected()
    for name, parameter in model.named_parameters():
        if "spft_delta" in name:
            parameter.data.fill_(float("inf"))
    return model


@pytest.mark.parametrize("name", CASES)
def test_one_line_with_what_was_seen_and_the_mend(name, tmp_path):
    act, fragments = CASES[name]
    with pytest.raises(SpftError) as raised:
        act(tmp_path)
    message = str(raised.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message, message


def test_fsdp1_is_refused(tmp_path):
    arguments = TrainingArguments(str(tmp_path), max_steps=1, report_to=[], use_cpu=True)
    trainer = SpftTrainer(
        tiny_model(), arguments, train_dataset=dataset(8), spft_config=SpftConfig(r=2)
    )
    callback = next(c for c in trainer.callback_handler.callbacks if isinstance(c, SpftCallback))
    trainer.is_fsdp_enabled = True  # and the accelerator's is_fsdp2 is not set
    with pytest.raises(SpftError, match="under FSDP1"):
        callback.on_train_begin(arguments, trainer.state, trainer.control)


def test_front_ends_can_call_the_fields_by_their_own_names():
    error = SpftError("`r` is 3 but r.layer has 2; lower `r` or use `density`")
    assert str(error) == "r is 3 but r.layer has 2; lower r or use density"
    renamed = error.within("`file` x").renamed({"r": "spft_r", "density": "spft_density"})
    assert str(renamed) == "file x: spft_r is 3 but r.layer has 2; lower spft_r or use spft_density"


def test_front_ends_can_read_what_was_seen_and_what_is_allowed():
    with pytest.raises(SpftError) as raised:
        SpftConfig(r=0)
    error = raised.value.renamed({"r": "spft_r"})
    assert (error.field, error.seen) == ("spft_r", 0)
    assert str(error) == f"spft_r is 0; allowed is {error.allowed}"

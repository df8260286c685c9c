"""SFT and DPO by TRL over 4- and 8-bit bases: the neurons start from the checkpoint's original rows
and only their deltas change, which stay fp32 though TRL makes them bf16. DPO's reference has those
rows too, so its first loss is log 2 exactly; over 4 bits every loss is the formula's on dense
models of the dequantised weights. Saved, resumed, loaded and merged it is the same to the bit."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch
from adapters import fill_deltas
from peft import PeftModel, get_peft_model
from preferences import dpo_loss
from quantised import BITS, dense, quantised, save_base
from tiny_models import batch
from trl import DPOConfig, SFTConfig
from trl_runs import NotingDPOTrainer, arguments, compact, completions, losses, pairs, tokenizer

from trainer_ext import (
    ImportanceScores,
    SelectedNeuronAdamW,
    SpftConfig,
    SpftError,
    SpftSFTTrainer,
    merge_checkpoint,
    select_neurons,
)
from trainer_ext.ranking.selection import top_neurons
from trainer_ext.training.callback import IMPORTANCE_FILE
from trainer_ext.tuner.base_layers import dense_weight
from trainer_ext.tuner.model import deltas, spft_layers

# A log-probability near 5 in fp32, summed over some 30 tokens of four rows, times beta
TOLERANCE = 5 * 2**-23 * 30 * 4 * 0.1
KINDS = {
    "sft": (SpftSFTTrainer, SFTConfig, completions),
    "dpo": (NotingDPOTrainer, DPOConfig, pairs),
}
FIELDS = {"r": 4, "calibration_batches": 2, "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module", params=BITS, ids=lambda bits: f"{bits}bit")
def bits(request):
    return request.param


def make(kind: str, model, folder, spft_config=None, **more):
    trainer, config, data = KINDS[kind]
    return trainer(
        model,
        args=arguments(config, folder, **more),
        train_dataset=data(),
        processing_class=tokenizer,
        spft_config=spft_config,
    )


@pytest.fixture(scope="module")
def trained(base, bits, tmp_path_factory):
    """Makes each kind's run by `spft_config` at most once: 3 steps, a checkpoint after 2, saved."""
    runs = {}

    def run(kind: str):
        if kind not in runs:
            folder = tmp_path_factory.mktemp(kind)
            model, config = quantised(base, bits), SpftConfig(**FIELDS)
            trainer = make(kind, model, folder, config, save_strategy="steps", save_steps=2)
            trainer.train()
            trainer.save_model()
            runs[kind] = SimpleNamespace(trainer=trainer, model=trainer.model, folder=folder)
        return runs[kind]

    return run


def assert_same_run(ours, theirs) -> None:
    assert losses(theirs) == losses(ours)
    ours, theirs = deltas(ours.model), deltas(theirs.model)
    for name, delta in ours.items():
        for key in ("weight", "index", "anchor"):
            a, b = getattr(delta, key), getattr(theirs[name], key)
            assert a.dtype == b.dtype
            assert torch.equal(a, b), (name, key)


def assert_reference_is_the_start(run) -> None:
    # precomputed in batches of other lengths, whose products are summed in another order
    tolerance = TOLERANCE if run.precompute_ref_logps else 0
    first = run.state.log_history[0]
    assert first["loss"] == pytest.approx(math.log(2), abs=max(tolerance, 2**-23))
    for rewards in ("rewards/chosen", "rewards/rejected"):
        assert abs(first[rewards]) <= tolerance
    assert abs(run.state.log_history[2]["rewards/margins"]) > 0.01


@torch.no_grad()
def assert_losses_are_the_formulas(run, base, start: dict | None = None) -> None:
    """
    Args:
        start: deltas of the reference, where they are not zero.
    """

    def rows(name: str, delta: torch.Tensor) -> torch.Tensor:
        return layers[name].spft_delta["default"].anchor.double() + delta.double()

    layers = spft_layers(run.model)
    policy, reference = dense(base).double(), dense(base).double()
    for name, layer in layers.items():
        weight = dense_weight(layer.get_base_layer()).double()
        policy.get_submodule(name).weight.copy_(weight)
        index = layer.spft_delta["default"].index
        weight[index] = rows(name, start[name][1] if start else torch.zeros(()))
        reference.get_submodule(name).weight.copy_(weight)
    assert len(run.notes) == 3 * 2
    for note in run.notes:
        for name, (index, delta) in note["deltas"].items():
            policy.get_submodule(name).weight[index] = rows(name, delta)
        assert note["loss"] == pytest.approx(dpo_loss(policy, note, reference), abs=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_only_deltas_change(base, bits, trained, kind):
    run = trained(kind)
    scores = ImportanceScores.load(run.folder / IMPORTANCE_FILE).scores
    original = dense(base, torch.bfloat16)
    for name, delta in deltas(run.model).items():
        assert torch.equal(delta.index, top_neurons(scores[name], 4))
        assert delta.anchor.dtype == torch.bfloat16
        assert delta.weight.dtype == torch.float32
        assert torch.equal(delta.anchor, original.get_submodule(name).weight[delta.index])
        assert (delta.weight != 0).any(dim=1).all()
    assert isinstance(run.trainer.optimizer.optimizer, SelectedNeuronAdamW)
    tensors = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in run.model.get_base_model().state_dict().items()
        if ".spft_delta." not in name
    }
    untouched = quantised(base, bits)
    untouched(**batch())  # after which 8-bit layers save their scales elsewhere
    expected = untouched.state_dict()
    assert tensors.keys() == expected.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())


def test_dpos_reference_has_the_original_rows(base, bits, trained):
    run = trained("dpo").trainer
    assert run.ref_model is None
    assert list(run.model.peft_config) == ["default"]
    assert_reference_is_the_start(run)
    if bits == 4:  # 8-bit layers round their inputs too
        assert_losses_are_the_formulas(run, base)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrapped_model_trains_the_same(base, bits, trained, tmp_path, kind):
    """TRL copies its adapter for a reference before there are neurons to copy."""

    def run():
        model = get_peft_model(quantised(base, bits), SpftConfig(**FIELDS))
        return make(kind, model, tmp_path, save_strategy="steps", save_steps=2)

    whole, resumed = run(), run()
    whole.train()
    assert ("ref" in whole.model.peft_config) == (kind == "dpo")
    assert_same_run(trained(kind).trainer, whole)
    if kind == "dpo":
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert_same_run(whole, resumed)


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_is_bit_identical(base, bits, trained, tmp_path, kind):
    run = trained(kind)
    resumed = make(kind, quantised(base, bits), tmp_path, SpftConfig(**FIELDS))
    resumed.train(resume_from_checkpoint=str(run.folder / "checkpoint-2"))
    assert_same_run(run.trainer, resumed)


@torch.no_grad()
def assert_saved_and_merged(run, base, bits, tmp_path) -> None:
    tokens = batch()["input_ids"]
    logits = run.model.eval()(tokens).logits
    loaded = PeftModel.from_pretrained(quantised(base, bits), run.folder).eval()
    assert torch.equal(loaded(tokens).logits, logits)
    merged = dense(merge_checkpoint(run.folder, tmp_path / "merged"), torch.bfloat16).state_dict()
    expected = dense(base, torch.bfloat16).state_dict()
    for name, delta in deltas(run.model).items():
        rows = (delta.anchor + delta.weight).to(torch.bfloat16)
        expected[f"{name}.weight"][delta.index] = rows
    assert all(torch.equal(merged[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("kind", KINDS)
def test_saved_loaded_and_merged(base, bits, trained, tmp_path, kind):
    """`test_only_deltas_change` has it that the anchors are the checkpoint's rows."""
    assert_saved_and_merged(trained(kind), base, bits, tmp_path)


def test_dpo_from_an_sft_adapter_over_the_same_base(base, bits, trained, tmp_path):
    sft = trained("sft")
    config = SpftConfig(start_adapter=str(sft.folder))
    run = make("dpo", quantised(base, bits), tmp_path / "run", config)
    started = deltas(run.model)
    run.train()
    run.save_model()
    for name, old in deltas(sft.model).items():
        rows = (old.anchor + old.weight.detach()).to(torch.bfloat16)
        assert torch.equal(started[name].index, old.index)
        assert torch.equal(started[name].anchor, rows)
        assert not torch.equal(rows, old.anchor)
    assert_reference_is_the_start(run)
    if bits == 4:
        assert_losses_are_the_formulas(run, base)
    saved = SimpleNamespace(model=run.model, folder=tmp_path / "run")
    assert_saved_and_merged(saved, base, bits, tmp_path)


def test_a_continued_adapter_is_its_own_reference(base, bits, trained, tmp_path):
    sft = trained("sft")
    model = PeftModel.from_pretrained(quantised(base, bits), sft.folder, is_trainable=True)
    run = make("dpo", model, tmp_path)
    run.train()
    assert_reference_is_the_start(run)
    if bits == 4:
        assert_losses_are_the_formulas(run, base, compact(sft.model))


def test_a_reference_is_precomputed_only_where_it_is_known(base, tmp_path):
    def precomputing(**fields):
        config = SpftConfig(**fields)
        return make("dpo", quantised(base, 4), tmp_path, config, precompute_ref_log_probs=True)

    refused = r"^precompute_ref_log_probs is set, but .*; drop it, or set quant_init to 'none'$"
    early = precomputing(**FIELDS)
    with pytest.raises(SpftError, match=refused):
        early.train()
    select_neurons(early.model, [batch()])
    with pytest.raises(SpftError, match=refused):
        early.train()
    fill_deltas(early.model)
    early.model.save_pretrained(tmp_path / "sft")
    for fields in ({"quant_init": "none", **FIELDS}, {"start_adapter": str(tmp_path / "sft")}):
        run = precomputing(**fields)
        run.train()
        assert_reference_is_the_start(run)
        if "start_adapter" in fields:
            assert_losses_are_the_formulas(run, base)

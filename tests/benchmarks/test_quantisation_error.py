"""Errors are those of the formulas on the dequantised weights: exact rows leave none in the trained
neurons and all of it in the others."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from quantisation_error import QuantisationError, quantisation_errors
from quantised import BITS, dense, quantised, save_base

from trainer_ext import SpftConfig, SpftError, select_neurons
from trainer_ext.tuner.model import spft_layers


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_base(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("quant_init", ["exact", "none"])
def test_errors_of_every_layer(base, bits, quant_init):
    config = SpftConfig(r=16, importance="magnitude", quant_init=quant_init)
    model = get_peft_model(quantised(base, bits), config)
    select_neurons(model)
    original = dense(base)
    errors = quantisation_errors(model)
    layers = spft_layers(model)
    assert errors.keys() == layers.keys()
    for name, layer in layers.items():
        weight = original.get_submodule(name).weight.detach()
        before = weight - layer.dense_weight().float()
        after = before.clone()
        if quant_init == "exact":
            after[layer.spft_delta["default"].index] = 0.0
        error = errors[name]
        assert error.before == pytest.approx(before.norm().item(), rel=1e-5)
        # what a selected row computes with is summed in fp32: Q + (W - Q)
        assert error.after == pytest.approx(after.norm().item(), rel=1e-5)
        singular = [torch.linalg.svdvals(m).sum().item() for m in (after, before)]
        assert error.nuclear_reduction == pytest.approx(1 - singular[0] / singular[1], abs=1e-5)
        assert (error.nuclear_reduction > 0.05) == (quant_init == "exact")


def test_layers_together_are_one_weight():
    torch.manual_seed(0)
    triples = [[torch.randn(3, 4) for _ in range(3)] for _ in range(2)]
    parts = [QuantisationError.of(*triple) for triple in triples]
    whole = QuantisationError.of(*(torch.cat(t) for t in zip(*triples, strict=True)))
    together = QuantisationError.together(parts)
    for name in ("weight_norm", "before", "after", "relative_before", "relative_after"):
        assert getattr(together, name) == pytest.approx(getattr(whole, name), rel=1e-6)


def test_a_dense_base_has_none(base):
    model = get_peft_model(dense(base), SpftConfig(r=4))
    with pytest.raises(SpftError, match="is not quantised, so it has no quantisation error"):
        quantisation_errors(model)

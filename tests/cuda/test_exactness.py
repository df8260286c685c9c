"""On the device, merging rounds W0 + delta as the CPU does, unmerging, restoring and unloading give
W0 back, and a written model computes what the merged one does: all to the bit, in every dtype.

No tolerance: sums of two numbers and roundings are exact by IEEE 754 on every device, and the same
kernel on the same numbers gives the same bits. Logits are compared in one attention kernel, whose
choice must not depend on what requires a gradient."""

from __future__ import annotations

import pytest
import torch
from adapters import trained
from devices import DEVICE
from tiny_models import batch
from torch.nn.attention import SDPBackend, sdpa_kernel
from written import base_weights, is_base, logits, originals, training, without_dropout

from trainer_ext import restore_base
from trainer_ext.tuner.model import deltas, spft_layers

pytestmark = pytest.mark.cuda

every_model = pytest.mark.parametrize("architecture", ["llama_bias", "gpt2"])
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])


def merged_weights(architecture, dtype) -> dict[str, torch.Tensor]:
    """round(W0 + delta), the sum in fp32, written out on the CPU."""
    model = trained(architecture, dtype)
    expected = originals(architecture, dtype)
    for name, delta in deltas(model).items():
        rows = expected[name].t() if spft_layers(model)[name].is_conv1d else expected[name]
        rows[delta.index] = (rows[delta.index].float() + delta.weight.detach()).to(dtype)
    return expected


def same_on_both(weights, expected) -> bool:
    return all(torch.equal(weights[name].cpu(), weight) for name, weight in expected.items())


@every_dtype
@every_model
def test_written_and_merged_weights_are_the_rounded_sums(architecture, dtype):
    expected = merged_weights(architecture, dtype)
    assert not same_on_both(originals(architecture, dtype), expected)
    model = training(architecture, dtype, device=DEVICE)
    assert same_on_both(base_weights(model), expected)
    model.merge_adapter(safe_merge=True)
    assert same_on_both(base_weights(model), expected)


@every_dtype
@every_model
def test_w0_comes_back(architecture, dtype):
    model = training(architecture, dtype, device=DEVICE)
    model.merge_adapter()
    model.unmerge_adapter()
    assert is_base(model, architecture, dtype)
    model(**batch(device=DEVICE))
    assert not is_base(model, architecture, dtype)
    restore_base(model)
    assert is_base(model, architecture, dtype)
    model(**batch(device=DEVICE))
    names = originals(architecture, dtype)
    base = model.unload()
    assert same_on_both({n: base.get_submodule(n).weight for n in names}, names)


@every_model
def test_written_rows_move_between_devices(architecture):
    model = training(architecture, device=DEVICE).cpu()
    assert same_on_both(base_weights(model), merged_weights(architecture, torch.float32))
    restore_base(model.to(DEVICE))
    assert is_base(model, architecture)


@every_dtype
@every_model
def test_the_forward_is_the_merged_models(architecture, dtype):
    model = training(architecture, dtype, device=DEVICE)
    merged = without_dropout(trained(architecture, dtype, device=DEVICE).merge_and_unload())
    merged.requires_grad_(True).train()
    data = batch(device=DEVICE)
    with sdpa_kernel(SDPBackend.MATH):
        assert torch.equal(model(**data).logits, merged(**data).logits)
        assert torch.equal(logits(model.eval()), logits(merged.eval()))

"""Nothing of the size of a full weight is made while training: not by gradients, masks, the
optimizer, the rewriting of rows, or their restoring; with either forward, from the first step."""

from __future__ import annotations

import pytest
import torch
from peft import get_peft_model
from tiny_models import few_tokens, wide_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer_ext import (
    SelectedNeuronAdamW,
    SpftConfig,
    restore_base,
    select_neurons,
    trained_parameters,
)
from trainer_ext.tuner.model import spft_layers

R = 16


class LargestNewStorage(TorchDispatchMode):
    """Bytes of the largest storage that an operator makes, views and in-place results left out."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        old = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if _is_tensor(t)}
        out = function(*args, **kwargs)
        for tensor in filter(_is_tensor, tree_leaves(out)):
            storage = tensor.untyped_storage()
            if storage._cdata not in old:
                self.bytes = max(self.bytes, storage.nbytes())
        return out


def _is_tensor(value) -> bool:
    return isinstance(value, torch.Tensor)


@pytest.mark.parametrize("state_bits", [32, 8])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("forward", ["delta", "write_through"])
def test_no_tensor_of_a_weights_size_is_made(forward, dtype, state_bits):
    model = get_peft_model(
        wide_model().to(dtype), SpftConfig(r=R, importance="magnitude", forward=forward)
    ).train()
    select_neurons(model)
    optimizer = SelectedNeuronAdamW(trained_parameters(model), state_bits=state_bits)
    layers = spft_layers(model).values()
    smallest = min(layer.in_features * layer.out_features for layer in layers)
    widest = max(layer.in_features for layer in layers)
    with LargestNewStorage() as largest:
        for batch in few_tokens():
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        written = {layer.written is not None for layer in layers}
        restore_base(model)
    assert written == {forward == "write_through"}
    # compact fp32 tensors are the largest, far below the smallest weight in its own dtype
    assert largest.bytes == 4 * R * widest
    assert largest.bytes < smallest * dtype.itemsize / 4

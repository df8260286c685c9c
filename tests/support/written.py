"""Models whose base weights hold an adapter's update, and what to compare them with."""

from __future__ import annotations

import torch
from adapters import selected, trained
from peft import PeftModel
from tiny_models import batch, tiny_model

from trainer_ext.tuner.model import deltas, spft_layers


def without_dropout(model):
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def training(
    architecture="llama", dtype=torch.float32, layers=(), device="cpu", **fields
) -> PeftModel:
    """A trained adapter in train mode whose update is written into the base weights, but for those
    of `layers`."""
    model = without_dropout(trained(architecture, dtype, device=device, **fields).train())
    step_once(model)
    model(**batch(device=device))
    unwritten = {n for n, layer in spft_layers(model).items() if layer.written is None}
    assert unwritten == set(layers)
    return model


def step_once(model, adapter_name: str = "default") -> None:
    """Let an optimizer step the deltas, which it leaves as they are: from the next training forward
    on the rows are written."""
    torch.optim.SGD([d.weight for d in deltas(model, adapter_name).values()], lr=0.0).step()


def base_weights(model) -> dict[str, torch.Tensor]:
    return {n: layer.get_base_layer().weight for n, layer in spft_layers(model).items()}


def originals(architecture="llama", dtype=torch.float32) -> dict[str, torch.Tensor]:
    model = tiny_model(architecture, dtype=dtype)
    names = spft_layers(selected(architecture, dtype))
    return {name: model.get_submodule(name).weight.detach() for name in names}


def is_base(model, architecture="llama", dtype=torch.float32) -> bool:
    """Whether every base weight is W0 to the bit."""
    expected = originals(architecture, dtype)
    return all(torch.equal(w.cpu(), expected[n]) for n, w in base_weights(model).items())


def gradients(model, data) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(**data).loss.backward()
    return {name: delta.weight.grad.clone() for name, delta in deltas(model).items()}


def logits(model, data=None) -> torch.Tensor:
    with torch.no_grad():
        return model(**(data or batch(device=model.device))).logits

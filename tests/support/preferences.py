"""DPO written out by hand on plain dense models: no PEFT, no TRL."""

from __future__ import annotations

import torch
from oracles import rows_of
from torch.nn.functional import logsigmoid

BETA = 0.1


def log_probs(model, batch: dict) -> torch.Tensor:
    """Sums over each row's completion tokens of their log-probabilities; (2 pairs,)."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    tokens = batch["input_ids"][:, 1:, None]
    each = logits[:, :-1].log_softmax(dim=-1).gather(2, tokens)[..., 0]
    return (each * batch["completion_mask"][:, 1:]).sum(dim=1)


def dpo_loss(model, batch: dict, reference: torch.nn.Module) -> torch.Tensor:
    """-log sigmoid(beta ((pi_c - ref_c) - (pi_r - ref_r))), mean over pairs; chosen rows first."""
    with torch.no_grad():
        reference_logs = log_probs(reference, batch)
    chosen, rejected = (log_probs(model, batch) - reference_logs).chunk(2)
    return -logsigmoid(BETA * (chosen - rejected)).mean()


@torch.no_grad()
def updated(model, compact: dict[str, tuple[torch.Tensor, torch.Tensor]]):
    """The dense model in fp64 with W[index] + delta in its layers, in place.

    Args:
        compact: (index, delta) of each layer.
    """
    model = model.double().eval()
    for name, (index, delta) in compact.items():
        layer = model.get_submodule(name)
        rows_of(layer, layer.weight)[index] += delta.double()
    return model

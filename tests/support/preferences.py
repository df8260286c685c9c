"""The losses of preference training, written out on plain dense models: no PEFT, no TRL."""

from __future__ import annotations

import math

import torch
from oracles import rows_of
from torch.nn.functional import logsigmoid

BETA = 0.1
# where policy and reference are the same
FIRST_LOSS = {"dpo": math.log(2), "ipo": 1 / (4 * BETA**2), "kto": 0.5}


def log_probs(model, batch: dict) -> torch.Tensor:
    """Sums over each row's completion tokens of their log-probabilities; (2 pairs,)."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    tokens = batch["input_ids"][:, 1:, None]
    each = logits[:, :-1].log_softmax(dim=-1).gather(2, tokens)[..., 0]
    return (each * batch["completion_mask"][:, 1:]).sum(dim=1)


def preference_loss(rl: str, model, batch: dict, reference: torch.nn.Module) -> torch.Tensor:
    """Of DPO: -log sigmoid(beta ((pi_c - ref_c) - (pi_r - ref_r))), of IPO its squared form on
    means over tokens; mean over the pairs of a batch that holds the chosen rows first."""
    with torch.no_grad():
        reference_logs = log_probs(reference, batch)
    ratios = log_probs(model, batch) - reference_logs
    if rl == "ipo":
        ratios = ratios / batch["completion_mask"][:, 1:].sum(1)
    chosen, rejected = ratios.chunk(2)
    if rl == "ipo":
        return ((chosen - rejected - 1 / (2 * BETA)) ** 2).mean()
    return -logsigmoid(BETA * (chosen - rejected)).mean()


def dpo_loss(model, batch: dict, reference: torch.nn.Module) -> torch.Tensor:
    """`preference_loss` of DPO."""
    return preference_loss("dpo", model, batch, reference)


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

"""The losses of preference training, written out."""

from __future__ import annotations

import math

import torch
from torch.nn.functional import logsigmoid

BETA = 0.1
# where policy and reference are the same
FIRST_LOSS = {"dpo": math.log(2), "ipo": 1 / (4 * BETA**2), "kto": 0.5}


def _log_probabilities(model, batch) -> torch.Tensor:
    """Of every row's completion, its tokens' sum."""
    tokens = batch["input_ids"]
    with torch.no_grad():
        logits = model(input_ids=tokens, attention_mask=batch["attention_mask"]).logits
    chosen = logits.log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    return (chosen * batch["completion_mask"][:, 1:]).sum(1)


def preference_loss(rl: str, policy, reference, batch) -> float:
    """The loss of DPO or IPO by its formula, of a batch that holds the chosen rows first."""
    ratios = _log_probabilities(policy, batch) - _log_probabilities(reference, batch)
    if rl == "ipo":  # means over tokens instead of sums
        ratios = ratios / batch["completion_mask"][:, 1:].sum(1)
    chosen, rejected = ratios.chunk(2)
    if rl == "ipo":
        return float(((chosen - rejected - 1 / (2 * BETA)) ** 2).mean())
    return float(-logsigmoid(BETA * (chosen - rejected)).mean())

"""Held-out loss of the base model and of a saved adapter, loaded anew from disk."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import trainer_ext  # noqa: F401 (registers SPFT with PEFT)

MAX_TOKENS = 512
BATCH_ROWS = 8


@dataclass(frozen=True)
class HeldOutLosses:
    """Mean loss in nats over the answers' tokens, each token counting the same."""

    before: float
    after: float
    tokens: int


def held_out_losses(base: Path, adapter: Path, samples: Path) -> HeldOutLosses:
    """Measure the base model (adapter off) and the adapter on the same batches.

    Args:
        base: folder of the base model.
        adapter: folder of the saved adapter.
        samples: JSONL file of chats; the loss counts the last message.
    """
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    model = PeftModel.from_pretrained(model, adapter).eval()
    chats = [json.loads(line)["messages"] for line in samples.read_text().splitlines()]
    before = after = tokens = 0
    for batch in batches(chats, tokenizer):
        after += summed_loss(model, batch)
        with model.disable_adapter():
            before += summed_loss(model, batch)
        tokens += int((batch["labels"][:, 1:] != -100).sum())
    return HeldOutLosses(before=before / tokens, after=after / tokens, tokens=tokens)


def batches(chats: list[list[dict]], tokenizer) -> Iterator[dict[str, torch.Tensor]]:
    """Padded batches, the longest first, with labels on the answers alone."""
    encoded = sorted((encode(chat, tokenizer) for chat in chats), key=lambda e: -len(e[0]))
    for start in range(0, len(encoded), BATCH_ROWS):
        yield padded_batch(encoded[start : start + BATCH_ROWS], tokenizer)


def padded_batch(rows: list[tuple[list[int], list[int]]], tokenizer) -> dict[str, torch.Tensor]:
    """Encoded chats of any lengths as one batch, padded at the end."""
    width = max(len(ids) for ids, _ in rows)
    return {
        "input_ids": _padded([ids for ids, _ in rows], width, tokenizer.pad_token_id),
        "attention_mask": _padded([[1] * len(ids) for ids, _ in rows], width, 0),
        "labels": _padded([labels for _, labels in rows], width, -100),
    }


def encode(chat: list[dict], tokenizer) -> tuple[list[int], list[int]]:
    """Token ids and labels of a chat: the last message and its end mark are to be predicted."""
    prompt = tokenizer.apply_chat_template(chat[:-1], tokenize=False, add_generation_prompt=True)
    answer = chat[-1]["content"] + tokenizer.eos_token
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer_ids = tokenizer(answer, add_special_tokens=False)["input_ids"]
    ids = prompt_ids + answer_ids
    labels = [-100] * len(prompt_ids) + answer_ids
    return ids[:MAX_TOKENS], labels[:MAX_TOKENS]


@torch.no_grad()
def summed_loss(model, batch: dict[str, torch.Tensor]) -> float:
    """Sum of the batch's token losses, in nats."""
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), batch["labels"][:, 1:].flatten(), reduction="sum"
    ).item()


def _padded(rows: list[list[int]], width: int, value: int) -> torch.Tensor:
    return torch.tensor([row + [value] * (width - len(row)) for row in rows])

"""DPO on a real model: teach SmolLM2-135M to prefer a function's own docstring to a sibling's.

Prepares model and pairs, trains by `SpftDPOTrainer`, and prints on held-out pairs how often the
reward of the right answer is the higher one, with its 95 % interval, beside chance and the start.

Usage: python quickstart/dpo.py [--max-steps 40] [--r 64] [--output quickstart/output-dpo]
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path

import preference_pairs
import prepare_data
import prepare_model
import torch
from datasets import Dataset
from evaluate import encode, padded_batch
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig

from trainer_ext import SpftConfig, SpftDPOTrainer

FOLDER = Path(__file__).resolve().parent
MODEL = FOLDER / "cache" / "model"
BETA = 0.1
ROWS = 8


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--max-steps", type=int, default=40)
    parser.add_argument("--r", type=int, default=64, help="neurons trained in each layer")
    parser.add_argument("--output", type=Path, default=FOLDER / "output-dpo")
    options = parser.parse_args(arguments)
    code = prepare_model.main([])
    if code:
        return code
    train, held_out = preference_pairs.train_and_held_out()
    print(f"{len(train)} derived pairs to train on, {len(held_out)} held out", flush=True)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    trainer = SpftDPOTrainer(
        AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.bfloat16),
        args=DPOConfig(
            str(options.output),
            beta=BETA,
            max_steps=options.max_steps,
            per_device_train_batch_size=4,
            learning_rate=1e-3,
            lr_scheduler_type="cosine",
            warmup_steps=4,
            max_length=256,
            logging_steps=1,
            save_strategy="no",
            bf16=True,
            use_cpu=not torch.accelerator.is_available(),
            gradient_checkpointing=False,
            report_to=[],
            seed=42,
        ),
        train_dataset=Dataset.from_list(train),
        processing_class=tokenizer,
        spft_config=SpftConfig(r=options.r, calibration_batches=4),
    )
    trainer.train()
    trainer.save_model()
    model = trainer.model.eval()
    with model.disable_adapter():
        before = log_ratios(model, tokenizer, held_out)
    after = log_ratios(model, tokenizer, held_out)
    result = summary(before, after)
    prepare_data.write_whole(options.output / "dpo.json", json.dumps(result, indent=1).encode())
    print(table(result))
    return 0


@torch.no_grad()
def log_ratios(model, tokenizer, pairs: list[dict]) -> torch.Tensor:
    """log p(chosen) - log p(rejected) of each pair, summed over the answers' tokens."""
    sums = {}
    for kind in ("chosen", "rejected"):
        encoded = [encode(row["prompt"] + row[kind], tokenizer) for row in pairs]
        values = torch.zeros(len(pairs))
        order = sorted(range(len(pairs)), key=lambda i: len(encoded[i][0]))
        for start in range(0, len(order), ROWS):
            chunk = order[start : start + ROWS]
            batch = padded_batch([encoded[i] for i in chunk], tokenizer)
            values[chunk] = answer_log_probs(model, batch)
        sums[kind] = values
    return sums["chosen"] - sums["rejected"]


def answer_log_probs(model, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """Summed log-probabilities of the labelled tokens of each row."""
    batch = {name: tensor.to(model.device) for name, tensor in batch.items()}
    labels = batch.pop("labels")[:, 1:]
    row, position = (labels != -100).nonzero(as_tuple=True)
    # of the answers' tokens alone: the vocabulary is large
    logits = model(**batch).logits[row, position].float()
    chosen = logits.log_softmax(-1).gather(-1, labels[row, position, None])[:, 0]
    return chosen.new_zeros(len(labels)).index_add_(0, row, chosen).cpu()


def summary(before: torch.Tensor, after: torch.Tensor) -> dict:
    """Shares of pairs with their 95 % Wilson intervals.

    The reward of an answer is beta (log p_trained - log p_start), so at the start all are equal.
    """
    rewards = BETA * (after - before)
    return {
        "pairs": len(rewards),
        "reward_accuracy": interval(int((rewards > 0).sum()), len(rewards)),
        "likelier_before": interval(int((before > 0).sum()), len(before)),
        "likelier_after": interval(int((after > 0).sum()), len(after)),
        "mean_margin": rewards.mean().item(),
    }


def interval(hits: int, count: int, z: float = 1.959964) -> dict:
    """A share and its 95 % interval by Wilson's score."""
    share = hits / count
    centre = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return {"share": share, "low": centre - half, "high": centre + half}


def table(result: dict) -> str:
    def shown(key: str) -> str:
        figures = result[key]
        return f"{figures['share']:.1%}  (95 %: {figures['low']:.1%} to {figures['high']:.1%})"

    return "\n".join(
        [
            "",
            f"SPFT by DPO, {result['pairs']} held-out pairs",
            f"  right answer has the higher reward          {shown('reward_accuracy')}",
            "     chance 50 %; at the start all rewards are zero",
            f"  right answer is the likelier one, at start  {shown('likelier_before')}",
            f"  right answer is the likelier one, trained   {shown('likelier_after')}",
            f"  mean reward margin                          {result['mean_margin']:.3f}",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())

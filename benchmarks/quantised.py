"""SPFT over a 4-bit base against QLoRA and LoftQ: error at the start, held-out loss after training.

The quickstart's model in NF4 (double quantisation, bf16 arithmetic), its data, as many trained
parameters and as many tokens in the same order for every method. Each method is trained at each
learning rate with the first seed, and with the other seeds at the best of them.

    python benchmarks/quantised.py [--seeds 42 43 44] [--steps 12]       # after make quickstart
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from bitsandbytes.nn import Params4bit
from measuring import describe_machine, positive
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from peft_adapters import ADAPTERS, nearest_rank
from quantisation_error import QuantisationError, quantisation_errors
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from trainer_ext import SelectedNeuronAdamW, SpftConfig, select_neurons, trained_parameters
from trainer_ext.files.atomic import write_bytes
from trainer_ext.files.base_checkpoint import BaseCheckpoint
from trainer_ext.tuner.base_layers import dense_weight, prepare_quantised
from trainer_ext.tuner.model import spft_layers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "quickstart"))

import evaluate  # noqa: E402 (the quickstart's scripts are no package)

CACHE = ROOT / "quickstart" / "cache"
R = 64  # neurons a layer, as in the quickstart
ROWS = 4  # of a step
CALIBRATION_BATCHES = 4
HELD_OUT = 48
LOFTQ_ITERATIONS = 5  # of the LoftQ paper
LEARNING_RATES = (1e-3, 3e-3)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42, 43, 44])
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--steps", type=positive, default=12)
    parser.add_argument("--model", type=Path, default=CACHE / "model")
    parser.add_argument("--data", type=Path, default=CACHE / "data")
    parser.add_argument("--output-dir", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(argv)
    if not args.model.is_dir() or not args.data.is_dir():
        parser.error("the quickstart's model or data are not there; run make quickstart first")
    runs: list[dict] = []
    for method in args.methods:
        kept: dict = {}
        best = None
        for seed in args.seeds:
            for rate in LEARNING_RATES if best is None else (best,):
                runs.append(run(method, seed, rate, args, kept))
                print(json.dumps(runs[-1]), flush=True)
            if best is None:
                best = min(runs[-len(LEARNING_RATES) :], key=lambda r: r["after"])["rate"]
                runs = [r for r in runs if r["method"] != method or r["rate"] == best]
    report = {
        "script": "benchmarks/quantised.py",
        "command": " ".join(["python benchmarks/quantised.py", *(argv or sys.argv[1:])]).strip(),
        "machine": describe_machine(torch.device("cpu")),
        "steps": args.steps,
        "runs": runs,
    }
    folder = args.output_dir / "quantised-135m-docstrings"
    write_bytes(folder / "figures.json", (json.dumps(report, indent=1) + "\n").encode())
    write_bytes(folder / "table.md", render(report).encode())
    print(render(report))
    return 0


def run(method: str, seed: int, rate: float, args: argparse.Namespace, kept: dict) -> dict:
    """Train one method once; losses in nats a token of the held-out answers.

    Args:
        kept: what depends on less than that, from one run of the method to the next.
    """
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(args.model)
    chats = [json.loads(line)["messages"] for line in _lines(args.data / "train.jsonl")]
    random.Random(seed).shuffle(chats)
    batches = [
        next(evaluate.batches(chats[start : start + ROWS], tokenizer))
        for start in range(0, args.steps * ROWS, ROWS)
    ]
    held_out = [json.loads(line)["messages"] for line in _lines(args.data / "held_out.jsonl")]
    model, error = METHODS[method](_quantised(args.model), batches, seed, kept)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = (SelectedNeuronAdamW if trained_parameters(model) else torch.optim.AdamW)(
        trained_parameters(model) or parameters, lr=rate, weight_decay=0.0
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / args.steps))
    )
    if seed not in kept:
        kept[seed] = error(), _held_out_loss(model, held_out, tokenizer)
    error, start = kept[seed]
    model.train()
    for batch in batches:
        model(**batch).loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return {
        "method": method,
        "seed": seed,
        "rate": rate,
        "trained_parameters": sum(p.numel() for p in parameters),
        "relative_error_before": error.relative_before,
        "relative_error_after": error.relative_after,
        "nuclear_reduction": error.nuclear_reduction,
        "start": start,
        "after": _held_out_loss(model, held_out, tokenizer),
    }


def _lines(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines()


def _quantised(folder: Path):
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.bfloat16
    )
    for name, module in model.named_modules():
        prepare_quantised(module, name)  # for all methods: evaluating would spoil training
    return model


def _held_out_loss(model, chats: list[list[dict]], tokenizer) -> float:
    model.eval()
    batches = list(evaluate.batches(chats[:HELD_OUT], tokenizer))
    tokens = sum(int((batch["labels"][:, 1:] != -100).sum()) for batch in batches)
    return sum(evaluate.summed_loss(model, batch) for batch in batches) / tokens


def _spft(quant_init: str) -> Callable:
    def build(base, batches, seed, kept):
        config = SpftConfig(r=R, quant_init=quant_init, seed=seed)
        model = get_peft_model(base, config)
        select_neurons(model, batches[:CALIBRATION_BATCHES])
        return model, lambda: QuantisationError.together(quantisation_errors(model).values())

    return build


def _lora(init: Callable) -> Callable:
    def build(base, batches, seed, kept):
        probe = get_peft_model(base, SpftConfig(r=R, quant_init="none"))
        layers = spft_layers(probe)
        shapes = [(layer.in_features, layer.out_features) for layer in layers.values()]
        budget = sum(R * d_in for d_in, _ in shapes)
        rank = nearest_rank(ADAPTERS["lora"], shapes, budget)
        base = prepare_model_for_kbit_training(probe.unload(), use_gradient_checkpointing=False)
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=list(layers))
        model = get_peft_model(base, config)
        checkpoint = BaseCheckpoint.find(base.name_or_path)
        for name in layers:
            layer = model.base_model.model.get_submodule(name)
            if name not in kept:
                every = torch.arange(layer.out_features)
                kept[name] = init(layer, checkpoint.rows(name, every).float())
            _fill_in(layer, *kept[name][:3])
        return model, lambda: QuantisationError.together(kept[name][3] for name in layers)

    return build


@torch.no_grad()
def _fill_in(layer, weight: Params4bit, a: torch.Tensor | None, b: torch.Tensor | None) -> None:
    if a is None:
        return  # as PEFT has drawn them
    layer.get_base_layer().weight = weight
    layer.lora_A["default"].weight.copy_(a)
    layer.lora_B["default"].weight.copy_(b)


@torch.no_grad()
def _zero(layer, original: torch.Tensor) -> tuple:
    """Quantised weight, A and B where they are not a fresh LoRA's, and the error that is left."""
    base = layer.get_base_layer()
    quantised = dense_weight(base)
    return base.weight, None, None, QuantisationError.of(original, quantised, quantised)


@torch.no_grad()
def _loftq(layer, original: torch.Tensor) -> tuple:
    """As `_zero`, by LoftQ (arXiv 2310.08659, algorithm 1): quantise W - BA, then BA = the best
    approximation of W - Q."""
    base = layer.get_base_layer()
    rank = layer.r["default"]
    first = dense_weight(base).float()
    low_rank = torch.zeros_like(original)
    for _ in range(LOFTQ_ITERATIONS):
        weight = Params4bit(
            (original - low_rank).to(torch.bfloat16),
            requires_grad=False,
            quant_type="nf4",
            compress_statistics=True,
            module=base,
        )
        base.weight = weight = weight.to("cpu")
        quantised = dense_weight(base).float()
        u, s, vh = torch.linalg.svd(original - quantised, full_matrices=False)
        b, a = u[:, :rank] * s[:rank].sqrt(), s[:rank, None].sqrt() * vh[:rank]
        low_rank = b @ a
    return weight, a, b, QuantisationError.of(original, first, quantised + low_rank)


METHODS = {
    "SPFT, exact rows": _spft("exact"),
    "SPFT, quantised rows": _spft("none"),
    "QLoRA": _lora(_zero),
    "LoftQ": _lora(_loftq),
}


def render(report: dict) -> str:
    """The table in Markdown."""
    by_method: dict[str, list[dict]] = {}
    for row in report["runs"]:
        by_method.setdefault(row["method"], []).append(row)
    lines = [
        f"SmolLM2-135M in NF4, {report['steps']} steps of {ROWS} rows, equal trained parameters. "
        "Error: ||W - Q'|| / ||W|| over all trained layers before training, and the share of the "
        "error's nuclear norm that the adapter removes. Losses: nats a token of held-out answers, "
        "mean over the seeds, each seed's in brackets.",
        "",
        "| method | trained parameters | error at start | nuclear norm removed | loss at start | "
        "loss after | learning rate |",
        "|---|---|---|---|---|---|---|",
    ]
    for method, rows in by_method.items():

        def mean(key: str, rows=rows) -> float:
            return statistics.mean(row[key] for row in rows)

        each = ", ".join(f"{row['after']:.3f}" for row in rows)
        lines.append(
            f"| {method} | {rows[0]['trained_parameters']:,} | {mean('relative_error_after'):.4f} "
            f"(of {mean('relative_error_before'):.4f}) | {mean('nuclear_reduction'):.1%} | "
            f"{mean('start'):.3f} | {mean('after'):.3f} ({each}) | {rows[0]['rate']:g} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())

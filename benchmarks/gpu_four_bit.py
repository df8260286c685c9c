"""The 4- and 8-bit stage of benchmarks/gpu.sh: exactness of the original rows, and a step's time.

    python benchmarks/gpu_four_bit.py [--device cuda] [--size 1b]

Exactness, at the tiny size in NF4 and int8: a fresh adapter's selected outputs are those of the
checkpoint's original rows to the bit, all others the quantised layer's; every delta moves in two
steps. The step: SPFT from quantised rows beside QLoRA at an equal number of trained parameters,
and beside the frozen quantised model, rounds interleaved.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import torch
from measuring import (
    describe_machine,
    make_versions,
    parse_gpu_stage,
    ratio_figures,
    seconds_figures,
    time_rounds,
)
from memory import held_bytes, peak_bytes_above_start
from methods import LEARNING_RATE, Method
from peft import get_peft_model
from peft_adapters import ADAPTERS, nearest_rank
from torch.nn.functional import linear
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from workload import SIZES, Workload

from trainer_ext import SelectedNeuronAdamW, SpftConfig, select_neurons, trained_parameters
from trainer_ext.files.atomic import write_bytes
from trainer_ext.tuner.model import spft_layers

KINDS = {
    "nf4": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.bfloat16,
    },
    "int8": {"load_in_8bit": True},
}
ROUNDS = 8


def workload(size: str, device: str) -> Workload:
    tokens = {"seq_len": 1024, "batch_size": 4} if device == "cuda" else {"seq_len": 16}
    options = {"batch_size": 2, "checkpointing": False, "dtype": torch.bfloat16, **tokens}
    return Workload(size=SIZES[size], device=torch.device(device), r=SIZES[size].r, **options)


def quantised(checkpoint: Path, kind: str, device: str):
    """The checkpoint loaded in 4 or 8 bits, in train mode."""
    config = BitsAndBytesConfig(**KINDS[kind])
    model = AutoModelForCausalLM.from_pretrained(
        checkpoint, quantization_config=config, device_map={"": device}, dtype=torch.bfloat16
    )
    return model.train()


def check_exactness(kind: str, device: str) -> None:
    """Raise AssertionError unless the selected neurons start from the checkpoint's own rows."""
    work = workload("tiny", device)
    with tempfile.TemporaryDirectory(prefix="spft-4bit-") as folder:
        work.base_model().save_pretrained(folder)
        dense = work.base_model()
        plain = quantised(Path(folder), kind, device)
        model = get_peft_model(
            quantised(Path(folder), kind, device), SpftConfig(r=work.r, importance="random")
        )
        select_neurons(model)
    layers = spft_layers(model)
    for name, layer in layers.items():
        torch.manual_seed(0)
        x = torch.randn(3, layer.in_features, device=device, dtype=torch.bfloat16)
        index = layer.spft_delta["default"].index
        with torch.no_grad():
            got, base = layer(x), plain.get_submodule(name)(x)
        expected = linear(x, dense.get_submodule(name).weight[index])
        assert torch.equal(got[:, index], expected), f"{kind}: selected outputs of {name} differ"
        others = torch.ones(layer.out_features, dtype=torch.bool, device=device)
        others[index] = False
        assert torch.equal(got[:, others], base[:, others]), f"{kind}: other outputs of {name}"
    method = Method(model, work, SelectedNeuronAdamW(trained_parameters(model), lr=LEARNING_RATE))
    method.step()
    method.step()
    still = [n for n, la in layers.items() if not la.spft_delta["default"].weight.abs().sum() > 0]
    assert not still, f"{kind}: the deltas of {', '.join(still)} have not moved"


def methods(kind: str, work: Workload, checkpoint: Path) -> dict[str, Method]:
    """The methods by name, each over a quantised model of its own."""
    device = work.device.type

    def fresh():
        model = quantised(checkpoint, kind, device)
        model.requires_grad_(False)
        model.enable_input_require_grads()
        return model

    spft = get_peft_model(fresh(), SpftConfig(r=work.r, importance="magnitude", quant_init="none"))
    select_neurons(spft)
    shapes = list(work.layers.values())
    rank = nearest_rank(ADAPTERS["lora"], shapes, work.budget)
    lora = get_peft_model(fresh(), ADAPTERS["lora"].config(rank, list(work.layers)))
    trained = [p for p in lora.parameters() if p.requires_grad]
    ours = SelectedNeuronAdamW(trained_parameters(spft), lr=LEARNING_RATE, fused=True)
    theirs = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)
    return {
        "frozen": Method(fresh(), work),
        "spft": Method(spft, work, ours),
        "qlora": Method(lora, work, theirs),
    }


def measure(kind: str, work: Workload, checkpoint: Path) -> dict:
    """Times and memory of a step of each method, and the ratios of times of the same round."""
    built = methods(kind, work, checkpoint)
    steps = {name: method.step for name, method in built.items()}
    for step in steps.values():
        step()
        step()
    peaks = {name: peak_bytes_above_start(step, work.device) for name, step in steps.items()}
    seconds = time_rounds(steps, ROUNDS, work.device, time_limit=20)
    rows = {}
    for name, method in built.items():
        rows[name] = {
            **seconds_figures(seconds[name]),
            **ratio_figures("ratio_to_frozen", seconds[name], seconds["frozen"]),
            **ratio_figures("ratio_to_qlora", seconds[name], seconds["qlora"]),
            "weight_bytes": held_bytes(method.model),
            "step_peak_bytes": peaks[name],
            "trained_parameters": sum(p.numel() for p in method.trainable),
        }
    return rows


def render(figures: dict) -> str:
    """The table in Markdown."""
    lines = [
        f"A training step over quantised bases: {figures['size']}, {figures['tokens']} tokens, "
        f"{figures['machine'].get('gpu', 'cpu')}, median of {ROUNDS} interleaved rounds at most.",
        "",
        "| base | method | s/step | x frozen | x QLoRA | trained | step memory |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    for kind, rows in figures["kinds"].items():
        for name, row in rows.items():
            lines.append(
                f"| {kind} | {name} | {row['median_seconds']:.3f} | {row['ratio_to_frozen']:.3f} | "
                f"{row['ratio_to_qlora']:.3f} | {row['trained_parameters']:,} | "
                f"{row['step_peak_bytes'] / 2**20:,.0f} MiB |"
            )
    return "\n".join([*lines, ""])


def main(argv: list[str] | None = None) -> int:
    args = parse_gpu_stage(__doc__, argv)
    for kind in KINDS:
        check_exactness(kind, args.device)
        print(f"{kind}: selected outputs are the original rows' to the bit", flush=True)
    work = workload(args.size, args.device)
    figures = {
        "size": args.size,
        "tokens": work.batch_size * work.seq_len,
        "machine": describe_machine(work.device),
        "versions": make_versions(),
        "kinds": {},
    }
    with tempfile.TemporaryDirectory(prefix="spft-4bit-") as folder:
        work.base_model().save_pretrained(folder)
        for kind in KINDS:
            figures["kinds"][kind] = measure(kind, work, Path(folder))
            write_bytes(args.output_dir / "figures.json", json.dumps(figures, indent=1).encode())
            write_bytes(args.output_dir / "table.md", render(figures).encode())
    print(render(figures))
    said = [
        f"{kind} {rows['spft']['ratio_to_frozen']:.3f} x frozen, "
        f"{rows['spft']['ratio_to_qlora']:.3f} x QLoRA's time"
        for kind, rows in figures["kinds"].items()
    ]
    print("; ".join(["selected rows exact", *said]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

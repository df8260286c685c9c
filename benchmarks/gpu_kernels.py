"""Times the choices inside a write-through step on this GPU, each beside its alternative.

    python benchmarks/gpu_kernels.py [--device cuda] [--size 1b]

Gather: the selected columns of an output's gradient, by rows of its transpose or by columns, alone
and with the product grad_delta = g[:, index]ᵀ x that follows. Rewriting: round(W0 + delta) into the
rows of all layers, layer by layer or in batches. Optimizer: torch's fused and foreach AdamW kernels
on all deltas. Host: the phases of whole steps so small that the GPU waits for Python in all of
them, whose differences to the frozen step's are what a method costs the host in 112 layers.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from measuring import describe_machine, make_versions, parse_gpu_stage, seconds_figures, time_rounds
from methods import METHODS
from peft import get_peft_model
from step_profile import phase_times
from workload import SIZES, Size, Workload

from trainer_ext import (
    SelectedNeuronAdamW,
    SpftConfig,
    select_neurons,
    trained_parameters,
    write_through,
)
from trainer_ext.files.atomic import write_bytes
from trainer_ext.tuner.functional import _grad_delta
from trainer_ext.tuner.model import spft_layers
from trainer_ext.tuner.write_through import rewrite

ROUNDS, INNER = 10, 20  # runs of a piece between two looks at the clock: launches overlap
HOST_ROUNDS = 20
HOST_METHODS = ("frozen", "spft_write_through", "spft_delta", "lora")


def gathers(work: Workload) -> dict[str, Callable[[], object]]:
    """The gather in both orders, alone and with the product, for each shape of layer."""
    found = {}
    tokens = work.batch_size * work.seq_len
    for d_in, d_out in sorted(set(work.layers.values())):
        generator = torch.Generator(work.device).manual_seed(0)
        options = {"dtype": work.dtype, "device": work.device, "generator": generator}
        grad = torch.randn(tokens, d_out, **options)
        x = torch.randn(tokens, d_in, **options)
        order = torch.randperm(d_out, device=work.device, generator=generator)
        index = order[: min(work.r, d_out)].sort().values
        shape = f"{d_in} -> {d_out}"

        def by_columns(grad=grad, index=index):
            return grad.index_select(1, index).t()

        def by_rows(grad=grad, index=index):
            return grad.t().index_select(0, index)

        def product(gather, x=x):
            return _grad_delta(gather(), x, torch.float32)

        found |= {
            f"gather by rows, {shape}": by_rows,
            f"gather by columns, {shape}": by_columns,
            f"with product, by rows, {shape}": lambda p=product, g=by_rows: p(g),
            f"with product, by columns, {shape}": lambda p=product, g=by_columns: p(g),
        }
    return found


def rewritings(work: Workload) -> dict[str, Callable[[], object]]:
    """Rewriting of all layers' rows, and steps of the optimizer on all deltas."""
    model = get_peft_model(work.base_model(), SpftConfig(r=work.r, importance="magnitude"))
    select_neurons(model)
    write_through(model)
    layers = list(spft_layers(model).values())

    @torch.no_grad()
    def one_by_one():
        for layer in layers:
            written, weight = layer.written, layer.get_base_layer().weight
            rows = written.rows + layer.spft_delta["default"].weight
            weight.index_copy_(0, written.index, rows.to(weight.dtype))

    parameters = trained_parameters(model)
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    found = {
        "rewriting, layer by layer": one_by_one,
        "rewriting, batched": lambda: rewrite(layers),
    }
    for name in ("fused", "foreach"):
        groups = [torch.nn.Parameter(p.detach().clone()) for p in parameters]
        for parameter, original in zip(groups, parameters, strict=True):
            parameter.grad = original.grad
        found[f"AdamW, {name}"] = torch.optim.AdamW(groups, **{name: True}).step
    found["SelectedNeuronAdamW and rewriting"] = SelectedNeuronAdamW(parameters, fused=True).step
    return found


def host_phases(work: Workload) -> dict[str, list[float]]:
    """Seconds of forward, backward and optimizer in every round, by "phase, method"."""
    narrow = Size(256, 512, layers=16, heads=4, kv_heads=2, vocab=256, tied=True, r=16)
    few = replace(work, size=narrow, r=narrow.r, seq_len=16, batch_size=1)
    methods = {name: METHODS[name](few) for name in HOST_METHODS}
    for method in methods.values():
        method.parts.clear()  # not among the phases
        method.step()
        method.step()
    seconds: dict[str, list[float]] = {}
    for _ in range(HOST_ROUNDS):
        for name, method in methods.items():
            for phase, milliseconds in phase_times(method, work.device).items():
                seconds.setdefault(f"host, {phase}, {name}", []).append(milliseconds / 1e3)
    return seconds


def render(figures: dict) -> str:
    """The table in Markdown."""
    lines = [
        f"Pieces of a step: {figures['size']}, {figures['tokens']} tokens, "
        f"{figures['machine'].get('gpu', 'cpu')}. Median (min-max) of {ROUNDS} interleaved rounds "
        f"of {INNER} runs each; of the host's phases, of {HOST_ROUNDS} steps of 16 tokens.",
        "",
        "| piece | µs |",
        "|---|--:|",
    ]
    for name, row in figures["pieces"].items():
        times = [1e6 * row[key] for key in ("median_seconds", "min_seconds", "max_seconds")]
        lines.append(f"| {name} | {times[0]:,.1f} ({times[1]:,.1f}-{times[2]:,.1f}) |")
    return "\n".join([*lines, ""])


def main(argv: list[str] | None = None) -> int:
    args = parse_gpu_stage(__doc__, argv)
    work = Workload(
        size=SIZES[args.size],
        dtype=torch.bfloat16,
        device=torch.device(args.device),
        seq_len=1024 if args.device == "cuda" else 16,
        batch_size=4,
        r=SIZES[args.size].r,
        checkpointing=False,
    )

    def repeated(run: Callable[[], object]) -> Callable[[], None]:
        def runs() -> None:
            for _ in range(INNER):
                run()

        return runs

    pieces = {name: repeated(run) for name, run in (gathers(work) | rewritings(work)).items()}
    for run in pieces.values():
        run()
    seconds = time_rounds(pieces, ROUNDS, work.device, time_limit=20)
    figures = {
        "size": args.size,
        "tokens": work.batch_size * work.seq_len,
        "machine": describe_machine(work.device),
        "versions": make_versions(),
        "pieces": {
            name: seconds_figures([s / INNER for s in times]) for name, times in seconds.items()
        }
        | {name: seconds_figures(times) for name, times in host_phases(work).items()},
    }
    write_bytes(args.output_dir / "figures.json", json.dumps(figures, indent=1).encode())
    write_bytes(args.output_dir / "table.md", render(figures).encode())
    print(render(figures))
    median = {name: 1e6 * row["median_seconds"] for name, row in figures["pieces"].items()}
    print(
        f"rewriting {median['rewriting, batched']:.0f} µs batched, "
        f"{median['rewriting, layer by layer']:.0f} layer by layer; AdamW "
        f"{median['AdamW, fused']:.0f} fused, {median['AdamW, foreach']:.0f} foreach"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())

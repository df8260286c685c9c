"""Prints the tables of docs/scaling.md: bytes sent and memory for 1 to 512 GPUs, by formula.

python benchmarks/scaling.py bytes --model 8b --r 64
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from measuring import positive
from scaling_bytes import METRICS, calibration_payload, step_payload, wire_bytes
from scaling_memory import GIB, accumulator_bytes, memory
from scaling_model import SHAPES, STAGES, Model, Run, numel

COUNTED = Path(__file__).parent / "results" / "traffic-tiny-cpu" / "figures.json"
MEMORY_ROWS = (
    ("ddp", 8),
    ("zero1", 8),
    ("zero2", 8),
    *((s, n) for s in ("zero3", "fsdp2") for n in (8, 512)),
)
KINDS = ("all_reduce", "all_gather", "reduce_scatter")


def table(head: list[str], rows: list[list[str]]) -> str:
    """Markdown, the figures to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def gb(nbytes: float) -> str:
    """In 10^9 bytes, three digits."""
    if not nbytes:
        return "0"
    if nbytes < 1e6:
        return "<0.001"
    return f"{nbytes / 1e9:.3g}" if nbytes < 1e11 else f"{nbytes / 1e9:.0f}"


def bytes_table(model: Model, args: argparse.Namespace) -> str:
    """Payload of one optimizer step by stage, and what each GPU sends, also by other methods."""
    rows = []
    for stage in STAGES:
        run = run_of(args, stage, args.world)
        payload = step_payload(model, run)
        sent = [
            wire_bytes(step_payload(model, run, method), args.world)
            for method in ("spft", "lora", "full")
        ]
        rows.append([stage, *(gb(payload.get(kind, 0)) for kind in KINDS), *map(gb, sent)])
    return table(["GB a step", *KINDS, "sent by each GPU", "LoRA", "full"], rows)


def calibration_table(model: Model, args: argparse.Namespace) -> str:
    """Payload of a whole calibration by metric, and what each GPU sends by stage."""
    rows = []
    for metric in METRICS:
        payloads = {
            stage: calibration_payload(
                model, run_of(args, stage, args.world), metric, args.batches, args.directions
            )
            for stage in ("ddp", "zero3", "fsdp2")
        }
        figures = [payloads["fsdp2"].get(kind, 0) for kind in KINDS]
        figures += [wire_bytes(payload, args.world) for payload in payloads.values()]
        rows.append([metric, *map(gb, figures)])
    head = ["GB a calibration", *(f"fsdp2 {kind}" for kind in KINDS)]
    return table([*head, "sent: ddp", "zero3", "fsdp2"], rows)


def memory_table(model: Model, args: argparse.Namespace) -> str:
    """GiB of each process by stage and number of processes."""
    rows = []
    for stage, world in MEMORY_ROWS:
        run = run_of(args, stage, world)
        parts = memory(model, run)
        others = [sum(memory(model, run, method).values()) for method in ("lora", "full")]
        trained = sum(parts[key] for key in ("values", "gradients", "master", "moments"))
        figures = [parts["base"], parts["gathered"], trained, parts["kept"]]
        figures += [sum(parts.values()), accumulator_bytes(model, run), *others]
        rows.append([f"{stage} {world}", *(f"{nbytes / GIB:.1f}" for nbytes in figures)])
    head = ["GiB a GPU", "base", "gathered", "trained", "kept rows", "sum"]
    return table([*head, "`taylor` adds", "LoRA sum", "full sum"], rows)


def counted_table() -> str:
    """What tests/distributed/test_traffic.py counted in real processes, and the formula."""
    cells: dict[str, dict[tuple[str, str], str]] = {}
    for row in json.loads(COUNTED.read_text()):
        same = row["counted"] == row["formula"]
        text = f"{row['counted']:,}" + ("" if same else f" (formula {row['formula']:,})")
        cells.setdefault(row["case"], {})[row["span"], row["world"]] = text
    columns = [(span, world) for span in ("step", "calibration") for world in ("2", "4")]
    head = ["bytes", *(f"{span}, {world} processes" for span, world in columns)]
    return table(head, [[case, *(c.get(key, "") for key in columns)] for case, c in cells.items()])


def run_of(args: argparse.Namespace, stage: str, world: int) -> Run:
    return Run(
        stage, world, args.accumulation, args.checkpointing, args.base_bytes, args.compact_bytes
    )


TABLES = {
    "bytes": bytes_table,
    "calibration": calibration_table,
    "memory": memory_table,
}


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("table", choices=[*TABLES, "counted"])
    parser.add_argument("--model", choices=SHAPES, default="8b", help="Llama's shape of that size")
    trained = parser.add_mutually_exclusive_group()
    trained.add_argument("--r", type=positive, default=64, help="neurons of each layer")
    trained.add_argument("--density", type=float, help="share of each layer's neurons instead")
    parser.add_argument("--world", type=positive, default=64, help="GPUs, of the tables of bytes")
    parser.add_argument("--accumulation", type=positive, default=1, help="micro batches of a step")
    parser.add_argument("--checkpointing", action="store_true", help="recompute activations")
    parser.add_argument("--base-bytes", type=positive, default=2, help="of a base weight")
    parser.add_argument("--compact-bytes", type=positive, default=4, help="of a trained weight")
    parser.add_argument("--batches", type=positive, default=8, help="of a calibration")
    parser.add_argument("--directions", type=positive, default=5, help="of zo_taylor")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    if args.table == "counted":
        print(counted_table())
        return
    model = Model(SHAPES[args.model], args.r, args.density)
    if args.table in ("bytes", "memory"):
        share = numel(model.compact) / numel(model.base)
        print(
            f"{args.model}: {numel(model.base) / 1e9:.2f} billion weights, "
            f"{numel(model.compact) / 1e6:.1f} million trained ({share:.1%}); "
            f"LoRA of rank {model.lora_rank} has {numel(model.trained('lora')) / 1e6:.1f}.\n"
        )
    print(TABLES[args.table](model, args))


if __name__ == "__main__":
    main()

"""Held-out loss after the same short training, by importance metric and by allocation.

Trains the quickstart's model on the quickstart's data (run `make quickstart` first) through
Axolotl, once a case and seed, with as many trained parameters each time, and measures the held-out
loss on the saved adapter loaded anew. A case is a few keys of the YAML.

    python benchmarks/quality.py [--seeds 42 43] [--cases random group_taylor] [--max-steps 24]
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import yaml
from measuring import describe_machine

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "quickstart"))

import evaluate  # noqa: E402 (the quickstart's scripts are no package)

CACHE = ROOT / "quickstart" / "cache"
SCORES = "spft_importance.safetensors"
CASES: dict[str, dict] = {
    "random": {"spft_importance": "random"},
    "magnitude": {"spft_importance": "magnitude"},
    "wanda": {"spft_importance": "wanda"},
    "zo_taylor": {"spft_importance": "zo_taylor"},
    # the module of the standard library that a function comes from
    "quantile_mean": {"spft_importance": "quantile_mean", "spft_class_field": "module"},
    "taylor": {"spft_importance": "taylor"},
    "group_taylor": {"spft_importance": "group_taylor"},
    # by the scores of the case before it
    "group_taylor, global": {"spft_allocation": "global", "spft_importance_file": SCORES},
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[42])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--max-steps", type=int, default=24)
    parser.add_argument("--output-dir", type=Path, default=ROOT / "benchmarks" / "results")
    args = parser.parse_args(argv)
    if not (CACHE / "model").is_dir():
        parser.error("the quickstart's model is not there; run `make quickstart` first")
    rows = []
    with tempfile.TemporaryDirectory(prefix="spft-quality-") as folder:
        for seed in args.seeds:
            for case in args.cases:
                rows.append(run(case, seed, args.max_steps, Path(folder)))
                print(json.dumps(rows[-1]), flush=True)
    report = {
        "script": "benchmarks/quality.py",
        "command": " ".join(["python benchmarks/quality.py", *(argv or sys.argv[1:])]),
        "machine": describe_machine(torch.device("cpu")),
        "max_steps": args.max_steps,
        "rows": rows,
    }
    folder = args.output_dir / "quality-135m-docstrings"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "figures.json").write_text(json.dumps(report, indent=1) + "\n")
    (folder / "table.md").write_text(render(report))
    print(render(report))
    return 0


def run(case: str, seed: int, max_steps: int, folder: Path) -> dict:
    """Train one case; its figures. Losses are nats a token of the held-out answers."""
    out = folder / f"{case.replace(', ', '-')}-{seed}"
    keys = dict(CASES[case])
    if "spft_importance_file" in keys:
        keys["spft_importance_file"] = str(folder / f"group_taylor-{seed}" / SCORES)
    config = yaml.safe_load((ROOT / "example_configs" / "quickstart.yml").read_text())
    config |= {
        # packed rows hold several classes
        "sample_packing": False,
        "micro_batch_size": 4,
        "spft_calibration_batches": 8,
        "max_steps": max_steps,
        "save_strategy": "no",
        "save_steps": None,
        "auto_resume_from_checkpoints": False,
        "dataset_prepared_path": str(folder / "prepared"),
        "output_dir": str(out),
        "seed": seed,
        "spft_seed": seed,
        **keys,
    }
    path = folder / "run.yml"
    path.write_text(yaml.safe_dump({k: v for k, v in config.items() if v is not None}))
    command = [sys.executable, "-m", "axolotl.cli.train", str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"{case}: axolotl train ended with {done.returncode}\n{done.stderr[-3000:]}"
        )
    losses = evaluate.held_out_losses(CACHE / "model", out, CACHE / "data" / "held_out.jsonl")
    report = json.loads((out / "spft_report.json").read_text())
    calibration = report["calibration"]
    return {
        "case": case,
        "seed": seed,
        "held_out_loss_before": losses.before,
        "held_out_loss_after": losses.after,
        "trainable_parameters": report["trainable_parameters"],
        "agreement_of_halves": calibration["agreement_of_halves"],
        "batches_wanted": calibration["batches_wanted"],
    }


def render(report: dict) -> str:
    """The table in Markdown, best case first."""
    by_case: dict[str, list[dict]] = {}
    for row in report["rows"]:
        by_case.setdefault(row["case"], []).append(row)
    means = {
        case: statistics.mean(row["held_out_loss_after"] for row in rows)
        for case, rows in by_case.items()
    }
    before = report["rows"][0]["held_out_loss_before"]
    lines = [
        f"Held-out loss (nats a token) after {report['max_steps']} steps of the quickstart without "
        f"packing; before: {before:.3f}. Mean over the seeds, each seed's in brackets.",
        "",
        "| case | held-out loss | trained parameters | halves agree (beyond chance) |",
        "|---|---|---|---|",
    ]
    for case in sorted(by_case, key=means.get):
        rows = by_case[case]
        each = ", ".join(f"{row['held_out_loss_after']:.3f}" for row in rows)
        agreements = [
            r["agreement_of_halves"] for r in rows if r["agreement_of_halves"] is not None
        ]
        agreement = f"{statistics.mean(agreements):.2f}" if agreements else ""
        lines.append(
            f"| {case} | {means[case]:.3f} ({each}) | {rows[0]['trainable_parameters']:,} | "
            f"{agreement} |"
        )
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    sys.exit(main())

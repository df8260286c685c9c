"""The quickstart: prepare model and data, train by Axolotl, measure, and say what came out.

Usage: python quickstart/run.py [--max-steps N]

An interrupted run continues where it stopped: whole checkpoints are resumed from, half-written ones
are removed. After a finished run the next one trains anew, from the cached model and data.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import evaluate
import prepare_data
import prepare_model

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "quickstart"
CONFIG = Path("example_configs/quickstart.yml")
CACHE = FOLDER / "cache"
OUTPUT = FOLDER / "output"
RESULT = FOLDER / "result.json"

# What transformers writes into a checkpoint; trainer_state.json comes last.
CHECKPOINT_FILES = ("adapter_model.safetensors", "optimizer.pt", "scheduler.pt")


def main(arguments: list[str] | None = None) -> int:
    """Run everything and return the exit code."""
    parser = argparse.ArgumentParser(description="Train SmolLM2-135M by SPFT and measure it.")
    parser.add_argument("--max-steps", type=int, help="train so many steps instead of the YAML's")
    options = parser.parse_args(arguments)
    for prepare in (prepare_model, prepare_data):
        code = prepare.main([])
        if code:
            return code
    clear_finished_run(OUTPUT, RESULT)
    remove_partial_work(OUTPUT, CACHE / "prepared")
    code = train(options.max_steps)
    if code:
        print(
            f"error: axolotl train ended with exit code {code}; its messages are above",
            file=sys.stderr,
        )
        return code
    print("measuring the held-out loss of the base model and of the saved adapter ...", flush=True)
    held_out = CACHE / "data" / "held_out.jsonl"
    losses = evaluate.held_out_losses(CACHE / "model", OUTPUT, held_out)
    result = collect_result(json.loads((OUTPUT / "spft_report.json").read_text()), losses)
    prepare_data.write_whole(RESULT, json.dumps(result, indent=1).encode())
    print(table(result))
    return 0


def clear_finished_run(output: Path, result: Path) -> None:
    """Remove the output of a run that ended; its result file says that it did."""
    if result.exists():
        shutil.rmtree(output, ignore_errors=True)
        result.unlink()


def remove_partial_work(output: Path, prepared: Path) -> None:
    """Remove what an interrupted run left half-written."""
    checkpoints = list(output.glob("checkpoint-*"))
    whole = [c for c in checkpoints if is_whole(c)]
    for checkpoint in set(checkpoints) - set(whole):
        print(f"removing the half-written {checkpoint.name} of an interrupted run")
        shutil.rmtree(checkpoint)
    if output.exists() and not whole:
        # Stopped before its first checkpoint, perhaps while Axolotl wrote the tokenised data.
        shutil.rmtree(prepared, ignore_errors=True)


def is_whole(checkpoint: Path) -> bool:
    """Whether every file of a checkpoint is there and its last one can be read."""
    try:
        json.loads((checkpoint / "trainer_state.json").read_text())
    except (OSError, ValueError):
        return False
    return all((checkpoint / name).is_file() for name in CHECKPOINT_FILES)


def train(max_steps: int | None) -> int:
    """Run `axolotl train` from the repository's root, as a user would."""
    binaries = Path(sys.executable).parent
    command = [str(binaries / "axolotl"), "train", str(CONFIG)]
    if max_steps is not None:
        command += ["--max-steps", str(max_steps)]
    # Axolotl starts `accelerate`, which it looks for on the path.
    path = f"{binaries}{os.pathsep}{os.environ.get('PATH', '')}"
    environment = {
        "OMP_NUM_THREADS": str(os.cpu_count()),  # `accelerate launch` would set it to 1
        **os.environ,
        "HF_HUB_OFFLINE": "1",
        "AXOLOTL_DO_NOT_TRACK": "1",
        "DO_NOT_TRACK": "1",
        "PATH": path,
    }
    return subprocess.run(command, cwd=ROOT, env=environment).returncode


def collect_result(report: dict, losses: evaluate.HeldOutLosses) -> dict:
    """The figures of this run, as `quickstart/result.json` keeps them."""
    return {
        "held_out_loss_before": losses.before,
        "held_out_loss_after": losses.after,
        "held_out_tokens": losses.tokens,
        "trainable_parameters": report["trainable_parameters"],
        "trainable_share": report["trainable_share"],
        "optimizer_state_bytes": report["optimizer_state_bytes"],
        "calibration_seconds": (report["calibration"] or {}).get("seconds"),
        "step_seconds": report["step_seconds"],
        "peak_memory_bytes": report["peak_memory_bytes"],
        "adapter_path": str(OUTPUT.relative_to(ROOT)),
        "report_path": str((OUTPUT / "spft_report.html").relative_to(ROOT)),
    }


def table(result: dict) -> str:
    """What a user wants to see at the end, and what to type next."""
    rows = {
        "held-out loss before": f"{result['held_out_loss_before']:.3f} nats a token "
        f"({result['held_out_tokens']:,} tokens)",
        "held-out loss after": f"{result['held_out_loss_after']:.3f} nats a token",
        "trainable parameters": f"{result['trainable_parameters']:,} "
        f"({result['trainable_share']:.1%} of the model)",
        "optimizer state": f"{result['optimizer_state_bytes'] / 2**20:.1f} MiB",
        "calibration": _seconds(result["calibration_seconds"]),
        "one training step": _seconds(result["step_seconds"]),
        "peak memory": f"{result['peak_memory_bytes'] / 2**30:.2f} GiB",
        "adapter": result["adapter_path"],
        "report": result["report_path"],
    }
    width = max(map(len, rows))
    lines = [f"  {name:<{width}}  {value}" for name, value in rows.items()]
    folder = result["adapter_path"]
    return "\n".join(
        [
            "",
            "SPFT quickstart",
            *lines,
            "",
            "Next:",
            "  source .venv/bin/activate",
            f"  axolotl inference {CONFIG} --lora-model-dir {folder}",
            f"  axolotl merge-lora {CONFIG} --lora-model-dir {folder}",
            f"  then put your own model and data into {CONFIG}",
        ]
    )


def _seconds(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.1f} s"


if __name__ == "__main__":
    sys.exit(main())

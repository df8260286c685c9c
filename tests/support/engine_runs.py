"""Runs of tests/distributed/run_worker.py, and what they leave behind."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import forked
import torch
from safetensors.torch import load_file
from tiny_models import tiny_model


@dataclass(frozen=True)
class EngineRun:
    """A run that has ended well.

    Attributes:
        out: its output_dir.
        ranks: what each process saved.
        adapter: tensors of the final adapter.
    """

    out: Path
    ranks: list[dict]
    adapter: dict[str, torch.Tensor]

    @property
    def losses(self) -> list[float]:
        return self.ranks[0]["losses"]

    @property
    def index(self) -> dict[str, torch.Tensor]:
        return self.ranks[0]["index"]


def save_base(folder: Path) -> Path:
    """A tiny base model on disk."""
    tiny_model().save_pretrained(folder)
    return folder


def start(engine: str, world: int, base: Path, out: Path, **options) -> list[forked.Ended]:
    """Run with the options of run_worker.py until all processes have ended."""
    grace = options.pop("grace", 10)
    text = json.dumps({"base": str(base), "out": str(out), **options})
    folder = out.with_name(f"{out.name}.ranks")
    return forked.run("run_worker.py", folder, world, engine, text, grace=grace)


def finish(engine: str, world: int, base: Path, out: Path, **options) -> EngineRun:
    """As `start`, for a run that must succeed."""
    ended = start(engine, world, base, out, **options)
    assert not any(e.code for e in ended), "\n".join(e.stderr[-5000:] for e in ended)
    return EngineRun(out, [e.result for e in ended], load_file(out / "adapter_model.safetensors"))


def relative_difference(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """Largest over the deltas of two adapters: |a - b| / |b| in the Euclidean norm."""
    names = [name for name in b if name.endswith(".weight")]
    assert names
    assert a.keys() == b.keys()
    return max(((a[n] - b[n]).norm() / b[n].norm()).item() for n in names)


def same_bits(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a
    )

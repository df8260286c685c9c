"""The run report: every figure as JSON, and a page with pictures beside the adapter."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch

from ..distributed.processes import world_size
from ..distributed.shards import local_tensor, whole_numel
from ..errors import in_plain_words
from ..files.atomic import write_bytes
from ..ranking.scores import ImportanceScores
from ..ranking.selection import NeuronSelection
from ..ranking.stability import Stability
from ..tuner.model import spft_layers
from ..tuner.selecting import current_selection
from ..versions import package_versions
from .page import render_page

REPORT_JSON = "spft_report.json"
REPORT_PAGE = "spft_report.html"


@dataclass
class RunFigures:
    """What only the running trainer knows.

    Attributes:
        step_seconds: median time of an optimizer step, data loading excluded; None before any.
        steps_timed: optimizer steps that the median is over.
        optimizer_state_bytes: bytes of all tensors in the optimizer's state on this process.
        log_history: the trainer's log entries.
    """

    step_seconds: float | None = None
    steps_timed: int = 0
    optimizer_state_bytes: int = 0
    log_history: list[dict] = field(default_factory=list)


def write_report(
    folder, model, adapter_name: str, scores: ImportanceScores | None, figures: RunFigures
) -> dict:
    """Write `spft_report.json` and `spft_report.html` into `folder`; returns the JSON's content.

    Args:
        scores: None where the selection was loaded and its scores are not known.
    """
    report = build_report(model, adapter_name, scores, figures)
    folder = Path(folder)
    # PEFT keeps some fields of its configurations as sets
    write_bytes(folder / REPORT_JSON, json.dumps(report, indent=1, default=sorted).encode())
    write_bytes(folder / REPORT_PAGE, render_page(report, scores).encode())
    return report


def build_report(
    model, adapter_name: str, scores: ImportanceScores | None, figures: RunFigures
) -> dict:
    """Collect all figures of a run. Bytes and seconds are plain numbers."""
    config = model.peft_config[adapter_name]
    selection = current_selection(model, adapter_name)
    trainable = sum(whole_numel(p) for p in model.parameters() if p.requires_grad)
    total = sum(
        whole_numel(p)
        for name, p in model.named_parameters()
        if ".spft_delta." not in name and ".modules_to_save." not in name
    )
    parameter = next(model.parameters())
    return {
        "versions": package_versions(),
        "device": _device_name(parameter.device),
        "base_dtype": str(parameter.dtype).removeprefix("torch."),
        "world_size": world_size(),
        "config": {k: v for k, v in config.to_dict().items() if v is not None},
        "trainable_parameters": trainable,
        "base_parameters": total,
        "trainable_share": trainable / total,
        "optimizer_state_bytes": figures.optimizer_state_bytes,
        "peak_memory_bytes": peak_memory_bytes(parameter.device),
        "step_seconds": figures.step_seconds,
        "steps_timed": figures.steps_timed,
        "calibration": _calibration_figures(scores, selection),
        "train_loss": _curve(figures.log_history, "loss"),
        "held_out_loss": _curve(figures.log_history, "eval_loss"),
        "layers": _layer_figures(model, adapter_name, selection, scores),
    }


def optimizer_state_bytes(optimizer) -> int:
    """Bytes that this process holds of an optimizer's state, wrapped by accelerate or not."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    held = (
        local_tensor(value)
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    )
    return sum(value.numel() * value.element_size() for value in held)


def peak_memory_bytes(device: torch.device) -> int:
    """Highest memory use so far: of the CUDA allocator, else of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource  # POSIX only

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def _calibration_figures(
    scores: ImportanceScores | None, selection: NeuronSelection
) -> dict | None:
    if scores is None:
        return None
    stability = _stability_of(scores, selection)
    return {
        "metric": scores.metric,
        "batches": scores.batches,
        "seconds": scores.seconds,
        "silent_layers": scores.silent_layers,
        "agreement_of_halves": None if stability is None else stability.agreement,
        "batches_wanted": None if stability is None else stability.batches_wanted,
        "diagnostics": scores.diagnostics,
        "warnings": [in_plain_words(warning) for warning in scores.warnings],
    }


def _stability_of(scores: ImportanceScores, selection: NeuronSelection) -> Stability | None:
    """The stability of the scores, if it was measured for as many neurons as are selected here."""
    stability = scores.stability
    if stability is None or any(
        round(stability.chance[name] * selection.out_features[name]) != index.numel()
        for name, index in selection.index.items()
    ):
        return None
    return stability


def _layer_figures(
    model, adapter_name: str, selection: NeuronSelection, scores: ImportanceScores | None
) -> dict[str, dict]:
    figures = {}
    stability = None if scores is None else _stability_of(scores, selection)
    for name, layer in spft_layers(model, adapter_name).items():
        index = selection.index[name]
        figures[name] = {
            "neurons": layer.out_features,
            "inputs": layer.in_features,
            "selected": index.tolist(),
        }
        if stability is not None:
            figures[name]["overlap_of_halves"] = stability.overlap[name]
            figures[name]["overlap_by_chance"] = stability.chance[name]
        if scores is not None:
            layer_scores = scores.scores[name]
            chosen = layer_scores[index]
            figures[name] |= {
                "highest_score": layer_scores.max().item(),
                "cut_score": chosen.min().item(),
                "lowest_score": layer_scores.min().item(),
                "selected_score_share": (
                    chosen.sum() / layer_scores.sum().clamp_min(1e-300)
                ).item(),
            }
    return figures


def _curve(log_history: list[dict], key: str) -> list[list[float]]:
    return [[entry["step"], entry[key]] for entry in log_history if key in entry]


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type}, {torch.get_num_threads()} threads"

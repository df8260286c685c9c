"""ImportanceScores: the result of a calibration, its file, and whether it fits an adapter."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..errors import SpftError
from ..files.atomic import read_tensors, write_tensors
from .stability import Stability

IMPORTANCE_KIND = "spft_importance"
_HEADER = (
    "kind",
    "axis",
    "metric",
    "batches",
    "seconds",
    "silent_layers",
    "stability",
    "diagnostics",
    "warnings",
)


@dataclass(frozen=True)
class ImportanceScores:
    """One score for every neuron of every targeted layer.

    Attributes:
        scores: layer name in the base model -> float64 (d_out,).
        metric: name of the importance metric.
        batches: calibration batches that they are averaged over (0: a metric without data).
        seconds: wall time of the calibration.
        silent_layers: layers that the calibration data never reached.
        stability: agreement of two halves of the data; None where it was not measured.
        diagnostics: what the metric itself found out, by the metric's own names.
        warnings: why the scores should not be trusted, one line each, with fields of SpftConfig in
            backticks.
        metadata: further strings, such as library versions.
    """

    scores: dict[str, torch.Tensor]
    metric: str
    batches: int = 0
    seconds: float = 0.0
    silent_layers: list[str] = field(default_factory=list)
    stability: Stability | None = None
    diagnostics: dict[str, Any] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)

    @property
    def out_features(self) -> dict[str, int]:
        """Layer name -> number of neurons."""
        return {name: scores.numel() for name, scores in self.scores.items()}

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, whole or not at all."""
        header = {
            **self.metadata,
            "kind": IMPORTANCE_KIND,
            "axis": "rows",
            "metric": self.metric,
            "batches": str(self.batches),
            "seconds": repr(self.seconds),
            "silent_layers": json.dumps(self.silent_layers),
            "stability": json.dumps(asdict(self.stability) if self.stability else None),
            "diagnostics": json.dumps(self.diagnostics),
            "warnings": json.dumps(self.warnings),
        }
        write_tensors(path, self.scores, header)

    @classmethod
    def load(cls, path: str | os.PathLike) -> ImportanceScores:
        """Read a file written by `save`.

        Raises:
            SpftError: the file is missing, damaged or of another kind.
        """
        scores, metadata = read_tensors(path, IMPORTANCE_KIND)
        try:
            return cls(
                scores=scores,
                metric=metadata["metric"],
                batches=int(metadata["batches"]),
                seconds=float(metadata["seconds"]),
                silent_layers=json.loads(metadata["silent_layers"]),
                stability=_stability(json.loads(metadata.get("stability", "null"))),
                diagnostics=json.loads(metadata.get("diagnostics", "{}")),
                warnings=json.loads(metadata.get("warnings", "[]")),
                metadata={k: v for k, v in metadata.items() if k not in _HEADER},
            )
        except (KeyError, ValueError, TypeError) as error:
            raise SpftError(f"{path} has no valid header ({error}); make it anew") from None

    @classmethod
    def load_for(cls, path: str | os.PathLike, sizes: dict[str, int]) -> ImportanceScores:
        """Read a configuration's `importance_file` for an adapter's layers.

        Args:
            sizes: layer name in the base model -> number of neurons, exactly the adapter's layers.

        Raises:
            SpftError: the file is missing, damaged, of another kind, or made for other layers.
        """
        try:
            scores = cls.load(path)
            check_same_layers("the file", scores.out_features, "the adapter", sizes)
        except SpftError as error:
            raise error.within(f"`importance_file` is {str(path)!r}") from None
        return scores


def _stability(values: dict | None) -> Stability | None:
    return None if values is None else Stability(**values)


def check_same_layers(
    left: str, left_sizes: dict[str, int], right: str, right_sizes: dict[str, int]
) -> None:
    """Compare two sets of layers with their numbers of neurons.

    Raises:
        SpftError: names the first difference and both sides.
    """
    for ours, ours_sizes, theirs, theirs_sizes in (
        (left, left_sizes, right, right_sizes),
        (right, right_sizes, left, left_sizes),
    ):
        only = sorted(set(ours_sizes) - set(theirs_sizes))
        if only:
            raise SpftError(
                f"{ours} has {len(only)} layers that {theirs} does not have, first {only[0]}; "
                "use the same model and `target_modules` for both"
            )
    for name, size in left_sizes.items():
        if right_sizes[name] != size:
            raise SpftError(
                f"layer {name} has {size} neurons in {left} but {right_sizes[name]} in {right}; "
                "they belong to different models"
            )


def check_finite(scores: dict[str, torch.Tensor]) -> None:
    """Refuse scores that say nothing.

    Args:
        scores: layer name -> (d_out,).

    Raises:
        SpftError: a score is NaN or infinite (the layer is named).
    """
    for name, layer_scores in scores.items():
        if not bool(torch.isfinite(layer_scores).all()):
            bad = int((~torch.isfinite(layer_scores)).sum())
            raise SpftError(
                f"importance of layer {name}: {bad} of {layer_scores.numel()} scores are NaN or "
                "infinite before any training; check the data and the model's weights for NaN, or "
                "use bf16 or fp32 instead of fp16"
            )

"""ImportanceScores: the result of a calibration, and the file that keeps it."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from ..errors import SpftError
from ..files import read_tensors, write_tensors
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
                stability=_stability(json.loads(metadata["stability"])),
                diagnostics=json.loads(metadata["diagnostics"]),
                warnings=json.loads(metadata["warnings"]),
                metadata={k: v for k, v in metadata.items() if k not in _HEADER},
            )
        except (KeyError, ValueError, TypeError) as error:
            raise SpftError(f"{path} has no valid header ({error}); make it anew") from None


def _stability(values: dict | None) -> Stability | None:
    return None if values is None else Stability(**values)

"""ImportanceScores: the result of a calibration, and the file that keeps it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field

import torch

from ..errors import SpftError
from ..files import read_tensors, write_tensors

IMPORTANCE_KIND = "spft_importance"
_HEADER = ("kind", "axis", "metric", "batches", "seconds", "silent_layers")


@dataclass(frozen=True)
class ImportanceScores:
    """One score for every neuron of every targeted layer.

    Attributes:
        scores: layer name in the base model -> float64 (d_out,).
        metric: name of the importance metric.
        batches: calibration batches that they are averaged over (0: a metric without data).
        seconds: wall time of the calibration.
        silent_layers: layers that the calibration data never reached.
        metadata: further strings, such as library versions.
    """

    scores: dict[str, torch.Tensor]
    metric: str
    batches: int = 0
    seconds: float = 0.0
    silent_layers: list[str] = field(default_factory=list)
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
                metadata={k: v for k, v in metadata.items() if k not in _HEADER},
            )
        except (KeyError, ValueError) as error:
            raise SpftError(
                f"{path} has no valid header ({error}); make it anew by a training run"
            ) from None

"""From importance scores to selected neurons, and the file that keeps them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field

import torch

from ..errors import SpftError
from ..files.atomic import read_tensors, write_tensors
from .scores import check_finite, check_same_layers

SELECTION_KIND = "spft_selection"


@dataclass(frozen=True)
class NeuronSelection:
    """Which neurons of which layers are trained.

    Attributes:
        index: layer name in the base model -> int64 (r,), ascending and distinct.
        out_features: layer name -> number of the layer's neurons.
        axis: what a neuron is; `rows` of the weight (output neurons).
        metadata: strings that say where the selection comes from.
    """

    index: dict[str, torch.Tensor]
    out_features: dict[str, int]
    axis: str = "rows"
    metadata: dict[str, str] = field(default_factory=dict)

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, whole or not at all."""
        header = {
            **self.metadata,
            "kind": SELECTION_KIND,
            "axis": self.axis,
            "out_features": json.dumps(self.out_features),
        }
        write_tensors(path, self.index, header)

    @classmethod
    def load(cls, path: str | os.PathLike) -> NeuronSelection:
        """Read a file written by `save`.

        Raises:
            SpftError: the file is missing, damaged or of another kind.
        """
        index, metadata = read_tensors(path, SELECTION_KIND)
        return cls(
            index=index,
            out_features=json.loads(metadata.pop("out_features")),
            axis=metadata.pop("axis"),
            metadata={k: v for k, v in metadata.items() if k != "kind"},
        )

    def check_fits(self, out_features: dict[str, int]) -> None:
        """Refuse a model whose layers are not those of this selection.

        Raises:
            SpftError: names the first layer that is missing, extra or of another size, or whose
                selected neurons do not exist.
        """
        check_same_layers("the selection", self.out_features, "the adapter", out_features)
        for name, index in self.index.items():
            if int(index.max()) >= out_features[name]:
                raise SpftError(
                    f"the selection names neuron {int(index.max())} of layer {name}, which has "
                    f"{out_features[name]} neurons; its file is damaged, select anew"
                )


def top_neurons(scores: torch.Tensor, r: int) -> torch.Tensor:
    """Indices of the r highest scores, ascending; of equal scores the lower index wins.

    Args:
        scores: (d_out,) finite.

    Returns:
        int64 (r,) on the CPU. The choice depends on the scores alone, not on device or process.
    """
    order = torch.sort(scores.detach().double().cpu(), descending=True, stable=True).indices
    return order[:r].sort().values


def select_top(scores: dict[str, torch.Tensor], neurons: dict[str, int]) -> NeuronSelection:
    """Select the highest-scoring neurons of every layer.

    Args:
        scores: layer name -> (d_out,).
        neurons: layer name -> how many neurons to select.

    Raises:
        SpftError: a score is NaN or infinite (the layer is named).
    """
    check_finite(scores)
    return NeuronSelection(
        index={name: top_neurons(s, neurons[name]) for name, s in scores.items()},
        out_features={name: s.numel() for name, s in scores.items()},
    )

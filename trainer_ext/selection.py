"""From importance scores to selected neurons, and the file that keeps them."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field

import torch
from torch import nn

from .distributed import any_nonzero
from .errors import SpftError
from .files import read_tensors, write_tensors
from .scores import check_finite, check_same_layers
from .tuner.anchors import original_rows
from .tuner.model import adapter_config, is_selected, layer_sizes, spft_layers

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


def apply_selection(
    model: nn.Module, selection: NeuronSelection, adapter_name: str = "default"
) -> None:
    """Fill a selection into the adapter's layers, and what the neurons start from.

    Copies of the adapter that wait for a selection (the reference that TRL makes) get the same.

    Args:
        selection: for exactly the adapter's layers.

    Raises:
        SpftError: layers or shapes differ, the adapter has been trained (its delta belongs to the
            neurons that it was trained for) or goes on from another one, or the neurons' original
            rows cannot be read. Nothing has been changed then.
    """
    selection.check_fits(layer_sizes(model, adapter_name))
    layers = spft_layers(model, adapter_name)
    config = adapter_config(model, adapter_name)
    if config.anchor == "adapter":
        raise SpftError(
            f"adapter {adapter_name!r} goes on with the neurons of `start_adapter` "
            f"{config.start_adapter!r}; to select others use a fresh SpftConfig without it"
        )
    for name, layer in layers.items():
        delta = layer.spft_delta[adapter_name]
        if delta.is_selected and any_nonzero(delta.weight):
            raise SpftError(
                f"adapter {adapter_name!r} is already trained (layer {name} has a non-zero delta); "
                "select neurons in a fresh adapter"
            )
    anchors = {}
    if config.anchor == "checkpoint":
        anchors = original_rows(model, layers, selection.index)
    for name, layer in layers.items():
        for other, delta in layer.spft_delta.items():
            waits = model.peft_config[other] == config and not delta.is_selected
            if other == adapter_name or (waits and anchors):
                delta.select(selection.index[name], anchors.get(name))


def current_selection(model: nn.Module, adapter_name: str = "default") -> NeuronSelection:
    """The adapter's selection as a `NeuronSelection`, on the CPU.

    Raises:
        SpftError: the neurons have not been selected yet.
    """
    if not is_selected(model, adapter_name):
        raise SpftError(
            f"the neurons of adapter {adapter_name!r} have not been selected yet; "
            "train it, or call trainer_ext.select_neurons(model)"
        )
    layers = spft_layers(model, adapter_name)
    return NeuronSelection(
        index={
            n: layer.spft_delta[adapter_name].index.cpu().clone() for n, layer in layers.items()
        },
        out_features=layer_sizes(model, adapter_name),
    )

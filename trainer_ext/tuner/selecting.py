"""Fills a selection into an adapter's layers, and reads it from them."""

from __future__ import annotations

from torch import nn

from ..distributed.shards import any_nonzero
from ..errors import SpftError
from ..ranking.selection import NeuronSelection
from .model import adapter_config, is_selected, layer_sizes, spft_layers
from .start_rows import original_rows


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
            waits = model.peft_config[other].copy_of == adapter_name and not delta.is_selected
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

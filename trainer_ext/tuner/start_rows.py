"""What the trained neurons start from, where that is not the base's own rows.

Over a quantised base: the original rows of the checkpoint that it was quantised from. Where
training goes on from another adapter and must be able to come back to it (DPO's reference): that
adapter's rows. Either is kept as the deltas' frozen anchor.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable
from contextlib import contextmanager

import torch
from torch import nn

from ..distributed.processes import from_main_process
from ..distributed.shards import is_sharded
from ..errors import SpftError
from ..files.adapter_file import AdapterFile
from ..files.base_checkpoint import BaseCheckpoint
from .base_layers import checkpoint_has_columns, quantisation_of

logger = logging.getLogger(__name__)

# What decides a layer's neurons: an adapter that is started from brings its own.
_BROUGHT = (
    "r",
    "density",
    "allocation",
    "allocation_floor",
    "allocation_ceiling",
    "r_pattern",
    "density_pattern",
    "allocated",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
)
_ALL = "all-linear"
# NF4 leaves a tenth of a weight's norm as error; other weights differ by more than their norm.
_MOST_ERROR = 0.5


def take_over_start(config) -> None:
    """Fill in what a fresh configuration takes over from its `start_adapter`.

    Raises:
        SpftError: the folder holds no SPFT adapter, one with modules_to_save, or one whose layers
            or numbers of neurons differ from what the configuration asks for.
    """
    if config.start_adapter is None or config.anchor is not None:
        return
    folder = config.start_adapter
    with _of_start_adapter():
        start = AdapterFile.read_config(folder)
    if start.modules_to_save or config.modules_to_save:
        raise SpftError(
            f"`start_adapter` is {folder!r} with modules_to_save "
            f"{start.modules_to_save or config.modules_to_save}: modules trained whole cannot be "
            "switched back to where they started; merge the adapter into the model first"
        )
    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    for field in _BROUGHT:
        wanted, has = getattr(config, field), getattr(start, field)
        is_given = wanted != defaults[field] and (field, wanted) != ("target_modules", _ALL)
        if is_given and _unordered(wanted) != _unordered(has):
            raise SpftError(
                f"`{field}` is {wanted!r} but the adapter in `start_adapter` {folder!r} was made "
                f"with {has!r}; drop `{field}`: the adapter brings its own"
            )
        setattr(config, field, has)


def _unordered(value):
    return sorted(value) if isinstance(value, (list, set, tuple)) else value


def settle_anchor(config, layers: Iterable[nn.Module]) -> None:
    """Fill in a fresh configuration's `anchor`; of a loaded one nothing is changed.

    Args:
        layers: the targeted linear layers.

    Raises:
        SpftError: `quant_init` is given for a dense base, or `forward: write_through` for a
            quantised one.
    """
    if config.anchor is not None:
        return
    kinds = sorted({kind for kind in map(quantisation_of, layers) if kind})
    if kinds and config.forward == "write_through":
        raise SpftError(
            f"`forward` is 'write_through' but the base weights are in {kinds[0][0]} bits, which "
            "cannot hold an update; set `forward` to 'auto' or 'delta'"
        )
    if kinds:
        config.quant_init = config.quant_init or "exact"
    elif config.quant_init is not None:
        raise SpftError(
            f"`quant_init` is {config.quant_init!r} but the targeted layers are not quantised; "
            "drop it, or load the model in 4 or 8 bits"
        )
    if config.start_adapter is not None:
        config.anchor = "adapter"
    else:
        config.anchor = "checkpoint" if config.quant_init == "exact" else "none"


def prepare_anchors(model: nn.Module, config, layers: dict, adapter_name: str) -> None:
    """Let fresh anchors be what they will hold: at once, or once their neurons are selected.

    Args:
        layers: layer name in the base model -> SPFT layer.

    Raises:
        SpftError: the original rows, or the adapter that is started from, cannot be read.
    """
    if config.anchor == "checkpoint":
        checkpoint = _checkpoint_of(model)
        for name, layer in layers.items():
            delta = layer.spft_delta[adapter_name]
            with _mend():
                delta.anchor = delta.anchor.to(checkpoint.weight(name).dtype)
    elif config.anchor == "adapter":
        _start_from(model, config, layers, adapter_name)


def original_rows(
    model: nn.Module, layers: dict, index: dict[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """The rows that quantised layers had before they were quantised, from the checkpoint's files.

    Args:
        layers: layer name in the base model -> SPFT layer.
        index: layer name -> int64 (r,).

    Returns:
        layer name -> (r, d_in) in the checkpoint's dtype, on the CPU.

    Raises:
        SpftError: they cannot be read, or are not those of this model.
    """
    if not layers:
        return {}
    checkpoint = _checkpoint_of(model)
    found, squares, differences = {}, 0.0, 0.0
    for name, layer in layers.items():
        base = layer.get_base_layer()
        with _mend():
            rows = checkpoint.rows(name, index[name].cpu(), checkpoint_has_columns(base))
        found[name] = rows
        if is_sharded(base.weight):
            continue
        square = rows.double().square().sum().item()
        loaded = layer.rows(index[name]).cpu()
        if loaded.shape != rows.shape:
            difference = float("inf")
        else:
            difference = (loaded.double() - rows.double()).square().sum().item()
        if difference > _MOST_ERROR**2 * square:
            raise SpftError(
                f"the rows of {name} in the checkpoint {checkpoint.source!r} are not those that "
                "this model was quantised from; load the model from that checkpoint, or set "
                "`quant_init` to 'none'"
            )
        squares, differences = squares + square, differences + difference
    logger.info(
        "SPFT starts the neurons of %d layers from the original rows in %s (quantisation error "
        "%.4f of their norm, now 0)",
        len(found),
        checkpoint.source,
        (differences / squares) ** 0.5 if squares else 0.0,
    )
    return found


def _checkpoint_of(model: nn.Module) -> BaseCheckpoint:
    with _mend():
        return BaseCheckpoint.of(model)


@contextmanager
def _mend():
    """Tell what can be done where the original rows cannot be read."""
    try:
        yield
    except SpftError as error:
        raise SpftError(
            f"`quant_init` is 'exact' (the default of a quantised base), but {error}; or set "
            "`quant_init` to 'none' to start from the quantised rows"
        ) from None


def _start_from(model: nn.Module, config, layers: dict, adapter_name: str) -> None:
    """Select an adapter's neurons, and make its values the anchor."""
    with _of_start_adapter():
        saved = AdapterFile.read(config.start_adapter).layers
        missing = [name for name in layers if name not in saved]
        if missing:
            raise SpftError(
                f"the adapter {config.start_adapter!r} has nothing for layer {missing[0]}; it was "
                "made for another model"
            )
    # its own anchor, else the base's rows: of a quantised base the original ones
    unanchored = {n: layer for n, layer in layers.items() if saved[n].get("anchor") is None}
    quantised = {n: layer for n, layer in unanchored.items() if not layer.has_dense_weight}
    index = {name: saved[name]["index"] for name in quantised}
    originals = original_rows(model, quantised, index) if config.quant_init == "exact" else {}
    for name, layer in layers.items():
        kinds = saved[name]
        start = kinds.get("anchor", originals.get(name))
        if start is None:
            # FSDP's loading by one process leaves the others' weights empty
            start = from_main_process(layer.rows(kinds["index"]).cpu())
        rows = (start + kinds["weight"]).to(start.dtype)
        layer.spft_delta[adapter_name].select(kinds["index"], rows)


@contextmanager
def _of_start_adapter():
    """Name the key that an adapter's mistakes come from."""
    try:
        yield
    except SpftError as error:
        raise error.within("`start_adapter`") from None

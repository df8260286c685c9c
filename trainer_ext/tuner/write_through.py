"""Write-through: base weights hold W0 + delta in their selected rows while an adapter trains.

The forward of such a layer is the plain linear layer's. W0's own rows are kept, and every rewriting
starts from them: nothing adds up, and after whatever interrupts it, the next forward or `end` sets
things right. `begin` keeps the rows, `rewrite` follows the deltas after each step, and `end` puts
W0's rows back.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from ..distributed.shards import ShardLayout, is_sharded, write_neurons, write_whole_neurons
from ..errors import SpftError
from .base_layers import quantisation_of

_ALONE, _STEPPED = "_spft_alone", "_spft_stepped"
# Names of the kept rows in a layer's state dict. They also lead to the tensors by attributes, as
# torch.distributed.checkpoint asks.
_KEPT_ROWS, _KEPT_INDEX = "written.rows", "written.index"
# Elements of deltas that are added to their rows together, by type of device: kernels are costly to
# start on a GPU; on a CPU one layer's sums still lie in the cache when they are copied.
_BUCKET_ELEMENTS = defaultdict(lambda: 2**24, cpu=0)


@dataclass
class WrittenRows:
    """What a layer keeps while its base weight holds an adapter's update: `SpftLinear.written`.

    Attributes:
        adapter: name of the adapter.
        index: int64 (r,), the rows that are written.
        rows: (r, d_in), what the base weight had there, in its own dtype.
        seen: state of the delta that the rows hold; None while they hold something uncertain.
    """

    adapter: str
    index: torch.Tensor
    rows: torch.Tensor
    seen: tuple | None = None

    def is_for(self, delta) -> bool:
        """Whether these are the neurons of a NeuronDelta; looks at the device only if unsure."""
        unchanged = self.seen is not None and self.seen[2:] == _state_of(delta)[2:]
        return unchanged or torch.equal(self.index, delta.index)

    def moved(self, fn) -> WrittenRows:
        """The same after `nn.Module._apply`, which moves or casts the weight."""
        return WrittenRows(self.adapter, fn(self.index), fn(self.rows), None)


def begin(layer, adapter_name: str) -> bool:
    """Keep W0's rows of an adapter's neurons, so that `rewrite` may write them.

    Returns:
        whether it may: the adapter's neurons are selected, its configuration allows it, no adapter
        is merged and the base weight is whole. What is written is put back otherwise.

    Raises:
        SpftError: `forward` is "write_through" and the weight is sharded, offloaded, the model's
            head, shared with another module or not the one that the adapter was put around.
    """
    delta, mode = layer.spft_delta[adapter_name], layer.config_of(adapter_name).forward
    whole = _is_whole(layer.get_base_layer().weight)
    if mode == "write_through" and not whole:
        raise SpftError(
            f"`forward` is 'write_through' but the weight of {layer.name} is sharded, offloaded, "
            "the model's head, used by another module too, or was replaced after the adapter was "
            "put in; set `forward` to 'auto' or 'delta'"
        )
    possible = mode != "delta" and whole and delta.is_selected and not layer.merged
    written = layer.written
    if written is not None and (
        not possible or written.adapter != adapter_name or not written.is_for(delta)
    ):
        end(layer)
    if possible and layer.written is None:
        index = delta.index.clone()
        layer.written = WrittenRows(adapter_name, index, layer.rows(index).clone())
    return possible


def written_delta(layer):
    """The only active adapter's NeuronDelta, if the base weight holds just that update; else None.

    Asked in every forward, so it looks at plain attributes: at a few microseconds a layer the host
    is what a GPU waits for.
    """
    written = layer.written
    if written is None or layer._disable_adapters or layer.merged_adapters:
        return None
    adapter_name = written.adapter
    if layer._active_adapter not in (adapter_name, [adapter_name]):
        return None
    delta = layer._modules["spft_delta"]._modules[adapter_name]
    if torch.compiler.is_compiling():
        return delta
    is_current = written.seen == _state_of(delta) and getattr(layer.base_weight, _ALONE, False)
    return delta if is_current else None


def holds_update(layer, adapter_name: str, delta) -> bool:
    """Whether the base weight holds W0 + the adapter's delta; sees to it where that is due.

    It is due where the delta trains and a torch optimizer has stepped it, and wherever it was
    changed by other means since the rows were written.
    """
    written = layer.written
    if torch.compiler.is_compiling():
        return written is not None and written.adapter == adapter_name
    if written is None:
        # Not before a step: who steps copies and writes back through `.data`, as DeepSpeed does,
        # could not be followed.
        if not (layer.trains(delta) and getattr(delta.held_weight, _STEPPED, False)):
            return False
    elif written.adapter != adapter_name or not _is_whole(layer.base_weight):
        return False
    elif written.seen == _state_of(delta):
        return True
    if not begin(layer, adapter_name):
        return False
    rewrite([layer])
    return True


@torch.no_grad()
def end(layer) -> None:
    """Put W0 back, bit for bit, where rows of the base weight hold an adapter's update."""
    written = layer.written
    if written is not None:
        written.seen = None
        _put(layer, written.index, written.rows)
        layer.written = None


def keep_in_state_dict(layer, destination: dict, prefix: str) -> None:
    """Save W0's rows beside the weight, which is saved as it is, to spare a copy of it.

    Whoever loads the whole model gets W0: beside a delta, written rows would count twice.
    """
    if layer.written is not None:
        destination[prefix + _KEPT_ROWS] = layer.written.rows
        destination[prefix + _KEPT_INDEX] = layer.written.index


def take_from_state_dict(layer, state_dict: dict, prefix: str) -> None:
    """Before a state dict is loaded: take out of it what `keep_in_state_dict` has put there."""
    rows, index = (state_dict.pop(prefix + key, None) for key in (_KEPT_ROWS, _KEPT_INDEX))
    if prefix + "base_layer.weight" in state_dict:
        # Nothing of what is in the weight now will be left.
        layer.kept_in_file = (index, rows)


def settle_loaded(layer, incompatible_keys=None) -> None:
    """Put the base weight in order after a state dict has been loaded into it or the adapter."""
    written = layer.written
    if layer.kept_in_file is not None:
        index, rows = layer.kept_in_file
        layer.kept_in_file = layer.written = None
        if rows is not None:
            layer.write_rows(index, rows)
    if written is not None and begin(layer, written.adapter):
        rewrite([layer])


def _state_of(delta) -> tuple:
    """Changes whenever a NeuronDelta's weight or index does, but for writes through `.data`."""
    weight, index = delta.held_weight, delta.held_index
    return weight.data_ptr(), weight._version, index.data_ptr(), index._version


def note_lone_weights(model: nn.Module, layers: Iterable) -> None:
    """Remember the base weights that nothing else in the model holds.

    Engines that put another tensor in a weight's place (FSDP2 does in every forward) lose the note,
    and such a weight must not be written: what is written would be lost. The head does not count:
    where it is a target, PEFT saves its base weight into every checkpoint of the adapter.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    holders: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        holders[id(parameter)] = holders.get(id(parameter), 0) + 1
    for layer in layers:
        weight = layer.get_base_layer().weight
        is_head = head is not None and head in (layer, layer.get_base_layer())
        is_dense = quantisation_of(layer.get_base_layer()) is None
        setattr(weight, _ALONE, is_dense and holders.get(id(weight)) == 1 and not is_head)


def _is_whole(weight: torch.Tensor) -> bool:
    """Whether this process holds all of a dense weight, for itself and for good."""
    return (
        getattr(weight, _ALONE, False)
        and not is_sharded(weight)
        and weight.device.type != "meta"
        and weight.is_floating_point()
    )


@torch.no_grad()
def rewrite(layers: Iterable) -> None:
    """Write round(W0 + delta) into the written rows of SPFT layers, the sum in the wider dtype.

    Where the adapter has an anchor, that stands in W0's place.
    """
    for bucket in _buckets(layers):
        for _, written, _ in bucket:
            written.seen = None
        starts = [written.rows if d.anchor is None else d.anchor for _, written, d in bucket]
        deltas = [delta.held_weight.detach() for _, _, delta in bucket]
        rounded = _rounded_sums(starts, deltas, [written.rows.dtype for _, written, _ in bucket])
        for (layer, written, delta), rows in zip(bucket, rounded, strict=True):
            _put(layer, written.index, rows)
            written.seen = _state_of(delta)


def _rounded_sums(
    starts: list[torch.Tensor], deltas: list[torch.Tensor], dtypes: list[torch.dtype]
) -> list[torch.Tensor]:
    """start + delta of each pair, summed in the wider dtype and rounded to the given one.

    On a GPU these are three kernels for all pairs together: the foreach sum of two different
    dtypes would be one or two for each.
    """
    if len({*dtypes, *(t.dtype for t in (*starts, *deltas))}) == 1:
        return list(torch._foreach_add(starts, deltas))
    sums = [
        torch.empty_like(delta, dtype=torch.promote_types(delta.dtype, start.dtype))
        for start, delta in zip(starts, deltas, strict=True)
    ]
    torch._foreach_copy_(sums, starts)
    torch._foreach_add_(sums, deltas)
    rounded = [torch.empty_like(s, dtype=dtype) for s, dtype in zip(sums, dtypes, strict=True)]
    torch._foreach_copy_(rounded, sums)
    return rounded


def _put(layer, index: torch.Tensor, rows: torch.Tensor) -> None:
    weight = layer.get_base_layer().weight
    if is_sharded(weight):  # an engine has taken it over meanwhile
        write_neurons(weight, ShardLayout.of(weight, layer.is_conv1d), index, rows)
    else:
        write_whole_neurons(weight, layer.is_conv1d, index, rows)


def _buckets(layers: Iterable) -> Iterator[list[tuple]]:
    """Layers of one device with their written rows and deltas, so many at a time that the sums stay
    small beside a model."""
    bucket: list[tuple] = []
    size = 0
    for layer in layers:
        written = layer.written
        device, count = written.rows.device, written.rows.numel()
        full = size + count > _BUCKET_ELEMENTS[device.type]
        if bucket and (full or device != bucket[0][1].rows.device):
            yield bucket
            bucket, size = [], 0
        bucket.append((layer, written, layer.spft_delta[written.adapter]))
        size += count
    if bucket:
        yield bucket


# SPFT layers, which follow the steps of any torch optimizer that holds their deltas.
_layers: weakref.WeakSet = weakref.WeakSet()
_hook = None


def follow_steps(layer) -> None:
    """Rewrite a layer's rows, where it has written ones, after each step of its adapter's delta."""
    global _hook
    _layers.add(layer)
    if _hook is None:
        _hook = register_optimizer_step_post_hook(_after_step)


def _after_step(optimizer, args, kwargs) -> None:
    stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
    # Inside a backward other layers still need the weights; the next forward sees to it.
    in_backward = torch._C._current_graph_task_id() != -1
    due = []
    for layer in _layers:
        for name, delta in layer.spft_delta.items():
            weight = delta.held_weight
            if id(weight) not in stepped:
                continue
            setattr(weight, _STEPPED, True)
            written = layer.written
            if written is None:
                continue
            if name == written.adapter:
                written.seen = None
                due.append(layer)
            elif layer.active_adapters == [name] and not in_backward:
                end(layer)  # this adapter trains now; its next forward writes its rows
    if not in_backward:
        rewrite(due)

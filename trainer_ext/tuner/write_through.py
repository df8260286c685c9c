"""Rows of a base weight that hold W0 + delta while an adapter trains, with W0's own kept.

The forward of such a layer is the plain linear layer's. Every rewriting starts from the kept rows,
so nothing adds up, and whatever interrupts it, the next forward or `restore` sets things right.
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
from .base_layers import quantisation_of

_ALONE, _STEPPED = "_spft_alone", "_spft_stepped"
# Elements of deltas that are added to their rows together, by type of device: kernels are costly to
# start on a GPU; on a CPU one layer's sums still lie in the cache when they are copied.
_BUCKET_ELEMENTS = defaultdict(lambda: 2**24, cpu=0)


@dataclass
class WrittenRows:
    """What a layer keeps while its base weight holds an adapter's update.

    Attributes:
        adapter: name of the adapter.
        index: int64 (r,), the rows that are written.
        rows: (r, d_in), what the base weight had there, in its own dtype.
        seen: `state_of` the delta that the rows hold; None while they hold something uncertain.
    """

    adapter: str
    index: torch.Tensor
    rows: torch.Tensor
    seen: tuple | None = None

    def is_for(self, delta) -> bool:
        """Whether these are the neurons of a NeuronDelta; looks at the device only if unsure."""
        unchanged = self.seen is not None and self.seen[2:] == state_of(delta)[2:]
        return unchanged or torch.equal(self.index, delta.index)

    def moved(self, fn) -> WrittenRows:
        """The same after `nn.Module._apply`, which moves or casts the weight."""
        return WrittenRows(self.adapter, fn(self.index), fn(self.rows), None)


def state_of(delta) -> tuple:
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


def is_whole(weight: torch.Tensor) -> bool:
    """Whether this process holds all of a dense weight, for itself and for good."""
    return (
        getattr(weight, _ALONE, False)
        and not is_sharded(weight)
        and weight.device.type != "meta"
        and weight.is_floating_point()
    )


def is_stepped(weight: torch.Tensor) -> bool:
    """Whether a torch optimizer has stepped this very parameter.

    DeepSpeed and others step copies and write back through `.data`, which nothing here would see.
    """
    return getattr(weight, _STEPPED, False)


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
            written.seen = state_of(delta)


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


@torch.no_grad()
def put_back(layer) -> None:
    """Write W0's own rows back; the layer still counts as written, with an uncertain content."""
    layer.written.seen = None
    _put(layer, layer.written.index, layer.written.rows)


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
                layer.restore()  # this adapter trains now; its next forward writes its rows
    if not in_backward:
        rewrite(due)

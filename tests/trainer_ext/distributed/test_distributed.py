"""ShardLayout: for any shape and world size the processes' ranges are disjoint and their union is
the weight, blocks tile a range, and the masks of selected neurons agree with plain indexing. DDP's
list of what it leaves out keeps the names of others. What is communicated goes to no device that is
not there. (Real engines: tests/distributed.)"""

from __future__ import annotations

import pytest
import torch
from adapters import wrapped
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer_ext.distributed.engines.ddp import DDP
from trainer_ext.distributed.processes import (
    communication_device,
    mean_over_processes,
    sum_over_processes,
)
from trainer_ext.distributed.shards import ShardLayout, local_shard, read_neurons, write_neurons
from trainer_ext.tuner.model import deltas, selection_buffers


@st.composite
def layouts(draw):
    rows, columns = draw(st.integers(1, 300)), draw(st.integers(1, 40))
    world = draw(st.integers(1, 17))
    by_rows = draw(st.booleans())  # FSDP2 cuts between rows, ZeRO-3 anywhere
    block = -(-rows // world) * columns if by_rows else -(-rows * columns // world)
    kind = "fsdp2" if by_rows else "zero3"
    return ShardLayout(rows, columns, draw(st.booleans()), world, block, kind)


@settings(deadline=None)
@given(layouts())
def test_ranges_are_disjoint_and_cover_the_weight(layout):
    flat = [range(*layout.local_range(rank)) for rank in range(layout.world)]
    assert [i for part in flat for i in part] == list(range(layout.numel))
    assert all(len(part) <= layout.block for part in flat)
    assert layout.block * layout.world >= layout.numel


@settings(deadline=None)
@given(layouts(), st.integers(1, 64))
def test_blocks_tile_each_range_in_order(layout, most_rows):
    weight = torch.arange(layout.numel).view(layout.rows, layout.columns)
    for rank in range(layout.world):
        start, stop = layout.local_range(rank)
        local, seen = weight.flatten()[start:stop], []
        for block in layout.blocks(rank, most_rows):
            piece = block.of(local)
            place = weight[block.row : block.row_stop, block.column : block.column_stop]
            assert torch.equal(piece, place)
            seen += piece.flatten().tolist()
            assert block.row // most_rows == (block.row_stop - 1) // most_rows  # crosses none
        assert seen == list(range(start, stop))


@settings(deadline=None)
@given(layouts(), st.data())
def test_masks_of_selected_neurons_are_plain_indexing(layout, data):
    d_out = layout.columns if layout.neurons_are_columns else layout.rows
    index = torch.tensor(
        sorted(data.draw(st.sets(st.integers(0, d_out - 1), min_size=1, max_size=min(d_out, 8))))
    )
    weight = torch.arange(layout.numel).view(layout.rows, layout.columns)
    compact = (weight.t() if layout.neurons_are_columns else weight)[index].flatten()
    found = torch.full_like(compact, -1)
    for rank in range(layout.world):
        start, stop = layout.local_range(rank)
        here, there = layout.selected_mask(index, rank)
        assert bool((found[there] == -1).all())  # nobody else holds them
        found[there] = weight.flatten()[start:stop][here]
    assert torch.equal(found, compact)


@pytest.mark.parametrize("neurons_are_columns", [False, True])
def test_reading_and_writing_neurons_of_a_replicated_weight(neurons_are_columns):
    weight = torch.rand(6, 8)
    layout = ShardLayout.of(weight, neurons_are_columns)
    index = torch.tensor([1, 4])
    by_neuron = weight.t() if neurons_are_columns else weight
    assert torch.equal(read_neurons(weight, layout, index), by_neuron[index])
    rows = torch.rand(2, by_neuron.shape[1])
    others = [i for i in range(len(by_neuron)) if i not in (1, 4)]
    before = by_neuron[others].clone()
    write_neurons(weight, layout, index, rows)
    assert torch.equal(by_neuron[index], rows)
    assert torch.equal(by_neuron[others], before)
    assert local_shard(weight, layout).data_ptr() == weight.data_ptr()


def test_one_process_sums_itself():
    tensors = {"a": torch.rand(3)}
    assert sum_over_processes(tensors) is tensors
    assert mean_over_processes(tensors) is tensors


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is an accelerator")
@pytest.mark.parametrize("backend", ["gloo", "undefined"])  # the latter where none is named
def test_an_accelerator_that_torch_was_only_built_for_communicates_nothing(monkeypatch, backend):
    """As a CUDA build on a machine without a GPU."""
    monkeypatch.setattr(torch._C, "_accelerator_getAccelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.distributed, "get_backend", lambda: backend)
    assert communication_device(torch.device("cpu")) == torch.device("cpu")


def test_the_buffers_of_a_selection_are_kept_from_ddps_broadcast():
    model = wrapped(r=4)
    model._ddp_params_and_buffers_to_ignore = ["somebody.else"]
    for _ in range(2):
        with DDP().leave_buffers_alone(model, selection_buffers(model)):
            pass
    left_out = set(model._ddp_params_and_buffers_to_ignore)
    own = {name for name, _ in model.named_buffers() if "spft_delta" in name}
    assert left_out == own | {"somebody.else"}
    assert len(own) == 2 * len(deltas(model))
    assert not any(hasattr(parameter, "_ddp_ignored") for parameter in model.parameters())

"""Invariants of benchmarks/memory.py:

- The tracker counts storages made inside it exactly: views, in-place results, resurrected Python
  objects and what was there before count nothing; what is freed counts nothing any more. A sparse
  tensor is its indices and its values.
- What a model holds are all tensors of its modules, also beside parameters, each storage once.
"""

from __future__ import annotations

from dataclasses import dataclass

import memory
import torch

MIB = 2**20


def test_the_tracker_counts_a_known_pattern():
    before = torch.zeros(MIB, dtype=torch.uint8)
    with memory.StorageTracker() as tracker:
        first = torch.empty(3 * MIB, dtype=torch.uint8)
        assert tracker.live_bytes == 3 * MIB
        second = first + 1
        assert tracker.live_bytes == 6 * MIB
        del first
        assert tracker.live_bytes == 3 * MIB
        parts = [second[: MIB // 2], second.view(3, -1), second.detach(), second.add_(1)]
        before.add_(1)
        views = before[1:].view(torch.int8)
        assert tracker.live_bytes == 3 * MIB
        del second
        assert tracker.live_bytes == 3 * MIB  # the views keep it
        del parts
        assert tracker.live_bytes == 0
        del before, views
        assert tracker.live_bytes == 0  # freeing what was there before makes nothing negative
        assert tracker.peak_bytes == 6 * MIB
        # The same addresses again: a freed storage's entry must not hide its successor.
        for _ in range(10):
            torch.empty(2 * MIB, dtype=torch.uint8)
        assert tracker.live_bytes == 0
        assert tracker.peak_bytes == 6 * MIB
        kept = torch.ones(MIB, dtype=torch.uint8)
    del kept
    assert tracker.live_bytes == MIB  # what happens after the block is not its business
    assert tracker.peak_bytes == 6 * MIB


def test_the_tracker_sees_what_only_autograd_holds():
    x = torch.ones(MIB // 4, requires_grad=True)
    with memory.StorageTracker() as tracker:
        y = x.exp().exp()  # both results are saved for the backward; one has no Python object
        assert tracker.live_bytes == 2 * MIB
        y.backward(torch.ones_like(y))
        del y
        assert tracker.live_bytes == MIB  # the gradient
        x.grad = None
        assert tracker.live_bytes == 0


def test_peak_above_start_leaves_out_what_is_there():
    weight = torch.ones(MIB, dtype=torch.uint8)
    peak = memory.peak_bytes_above_start(lambda: (weight + 1) + 1, torch.device("cpu"))
    assert peak == 2 * MIB


def test_the_tracker_counts_sparse_tensors_by_indices_and_values():
    places = torch.tensor([[0, 1], [1, 2]])
    values = torch.ones(2)
    with memory.StorageTracker() as tracker:
        sparse = torch.sparse_coo_tensor(places, values, (4, 4), check_invariants=False)
        assert tracker.live_bytes == 0  # both were there before
        doubled = sparse * 2
        assert tracker.live_bytes >= 2 * 4
        del doubled
        assert tracker.live_bytes == 0


def test_a_model_holds_every_storage_once():
    @dataclass
    class Kept:
        rows: torch.Tensor

    model = torch.nn.Sequential(torch.nn.Linear(4, 8, bias=False), torch.nn.Linear(4, 8))
    model[1].weight = model[0].weight  # tied
    expected = 4 * (4 * 8 + 8)
    assert memory.held_bytes(model) == expected
    model[0].register_buffer("index", torch.zeros(3, dtype=torch.int64))
    model[0].indices = {"default": torch.zeros(5, dtype=torch.int32)}
    model[0].kept = Kept(torch.zeros(7))
    model[1].view = model[0].weight[:2]
    assert memory.held_bytes(model) == expected + 3 * 8 + 5 * 4 + 7 * 4

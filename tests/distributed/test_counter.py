"""The counter of tests/support/traffic.py sees every collective once, with its whole payload:
blocking, async, coalesced and functional ones, those inside a DTensor's operators, and those that
DDP's reducer issues from C++."""

from __future__ import annotations

import pickle

import pytest
from forked import launch

WORLD = 2
PICKLED = len(pickle.dumps("neuron"))
# (kind, bytes, dtype) of every call
EXPECTED = {
    "all_reduce": [("all_reduce", 80, "float64")],
    "async": [("all_reduce", 40, "float32")],
    "coalesced": [("all_reduce", 28, "float32")],
    "functional": [("all_reduce", 24, "float32")],
    "all_gather": [("all_gather", 12 * WORLD, "float32")],
    "all_gather_into_tensor": [("all_gather", 12 * WORLD, "float32")],
    "functional_gather": [("all_gather", 12 * WORLD, "float32")],
    "reduce_scatter_tensor": [("reduce_scatter", 8 * WORLD, "float32")],
    "broadcast": [("broadcast", 9, "bool")],
    # the sizes, then the pickled objects, padded to the longest
    "all_gather_object": [
        ("all_gather", 8 * WORLD, "int64"),
        ("all_gather", PICKLED * WORLD, "uint8"),
    ],
    "barrier": [("barrier", 0, "")],
    "dtensor": [("all_reduce", 4, "float32")],
    "ddp": [("all_reduce", 4 * (7 * 5 + 5), "float32")],
    # one group: gathered for the forward and kept, as it is the root
    "fsdp2": [
        ("all_gather", 4 * 48 * WORLD, "float32"),
        ("reduce_scatter", 4 * 48 * WORLD, "float32"),
    ],
}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return launch("counter_worker.py", tmp_path_factory.mktemp("counter"), WORLD)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_collective_is_counted_once_with_its_payload(ranks, name):
    for rank in ranks:
        calls = [(call["kind"], call["nbytes"], call["dtype"]) for call in rank[name]]
        assert calls == EXPECTED[name]

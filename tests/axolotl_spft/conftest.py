"""One tiny model for all tests, and a process that looks fresh to each of them."""

from __future__ import annotations

from pathlib import Path

import pytest
from axolotl_runs import make_assets, own_process_state

HERE = Path(__file__).parent
_LAST = (HERE, HERE.parent / "example_configs")


@pytest.fixture(scope="session")
def assets(tmp_path_factory):
    return make_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture(autouse=True)
def process_state():
    with own_process_state():
        yield


def pytest_collection_modifyitems(items) -> None:
    """Axolotl patches transformers for the rest of the process: everything else runs before it."""
    items.sort(key=lambda item: any(folder in item.path.parents for folder in _LAST))

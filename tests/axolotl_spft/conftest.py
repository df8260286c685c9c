"""One tiny model for all tests, and a process that looks fresh to each of them."""

from __future__ import annotations

import pytest
from axolotl_runs import make_assets, own_process_state


@pytest.fixture(scope="session")
def assets(tmp_path_factory):
    return make_assets(tmp_path_factory.mktemp("assets"))


@pytest.fixture(autouse=True)
def process_state():
    with own_process_state():
        yield

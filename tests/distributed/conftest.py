"""What the tests of whole runs share."""

from __future__ import annotations

import pytest
from engine_runs import save_base


@pytest.fixture(scope="session")
def base(tmp_path_factory):
    """Folder of a tiny base model."""
    return save_base(tmp_path_factory.mktemp("base"))

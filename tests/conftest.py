"""Settings for every test: no hub, no telemetry, one thread (tiny tensors gain nothing by two)."""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "AXOLOTL_DO_NOT_TRACK": "1",
    "DO_NOT_TRACK": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "OMP_NUM_THREADS": "1",
    # Looked at once, in a process's first product on a GPU: without it none can be deterministic.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # The few graphs that are compiled are done before other processes have started.
    "TORCHINDUCTOR_COMPILE_THREADS": "1",
}

import pytest
import torch

torch.set_num_threads(1)

CUDA_TESTS = Path(__file__).parent / "cuda"


def pytest_ignore_collect(collection_path, config):
    """`pytest -m cuda` looks at its own folder alone: other tests import what a GPU machine may
    lack, such as Axolotl and bitsandbytes."""
    if config.getoption("markexpr") != "cuda":
        return None
    near = collection_path.is_relative_to(CUDA_TESTS) or CUDA_TESTS.is_relative_to(collection_path)
    return None if near else True


def pytest_collection_finish():
    freeze_imports()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup():
    freeze_imports()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_call():
    freeze_imports()


def pytest_sessionfinish():
    gc.unfreeze()  # or native libraries complain at the interpreter's end


_modules_frozen = 0


def freeze_imports() -> None:
    """Trainers collect garbage several times a run: half a second each, unless what has been
    imported is kept out of it."""
    global _modules_frozen
    if len(sys.modules) > _modules_frozen + 20:
        _modules_frozen = len(sys.modules)
        gc.collect()
        gc.freeze()

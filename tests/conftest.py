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

HERE = Path(__file__).parent
CUDA_TESTS = HERE / "cuda"
# Axolotl patches transformers for the rest of the process: everything else runs before it.
LAST = (HERE / "axolotl_spft", HERE / "example_configs")
# Files that take long, the longest first: pytest-xdist hands them out in this order, and no worker
# is left alone with one of them at the end.
LONG = (
    "quickstart/test_run.py",
    "distributed/test_resuming.py",
    "distributed/test_deaths.py",
    "distributed/test_two_hosts.py",
    "distributed/test_matrix.py",
    "distributed/test_engines.py",
    "distributed/test_traffic.py",
    "distributed/test_trl.py",
    "distributed/test_class_column.py",
    "distributed/test_activation_checkpointing.py",
    "trainer_ext/training/test_trainer.py",
    "axolotl_spft/test_processes.py",
    "axolotl_spft/test_calibrate_command.py",
    "example_configs/test_engine_examples.py",
)


def pytest_ignore_collect(collection_path, config):
    """`pytest -m cuda` looks at its own folder alone: other tests import what a GPU machine may
    lack, such as Axolotl and bitsandbytes."""
    if config.getoption("markexpr") != "cuda":
        return None
    near = collection_path.is_relative_to(CUDA_TESTS) or CUDA_TESTS.is_relative_to(collection_path)
    return None if near else True


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: _place(item.path))


def _place(file: Path) -> tuple[bool, int]:
    name = file.relative_to(HERE).as_posix()
    return any(folder in file.parents for folder in LAST), (*LONG, name).index(name)


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

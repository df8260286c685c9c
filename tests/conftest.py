"""Settings for every test: no hub, no telemetry, one thread (tiny tensors gain nothing by two)."""

from __future__ import annotations

import os

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

import torch

torch.set_num_threads(1)

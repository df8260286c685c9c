"""What several processes of Axolotl need on a CPU with a CUDA build of torch.

    cpu_processes.py MODULE ARGUMENTS    is    python -m MODULE ARGUMENTS

Axolotl asks torch whether its GPUs reach each other. It expects a CPU build's answer, an
AssertionError; a CUDA build without a driver raises another error.
"""

from __future__ import annotations

import runpy
import sys

import torch


def expect_no_gpu() -> None:
    """Let torch answer as a CPU build does."""

    def no_gpu(*args):
        raise AssertionError("no GPU")

    if not torch.cuda.is_available():
        torch.cuda.can_device_access_peer = no_gpu


def average_micro_batches_alone(trainer) -> None:
    """Let one process average its micro batches as so many processes would.

    Axolotl has each process average its own tokens of a step (`average_tokens_across_devices` is
    off). Since 0.20 a process takes all of its micro batches together there; what two processes do
    with one each is then another average than one process's with two.
    """
    trainer.model_accepts_loss_kwargs = False


if __name__ == "__main__":
    expect_no_gpu()
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)

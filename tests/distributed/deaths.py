"""Lets a process kill itself (SIGKILL) at a given point of its run.

calibration N   before the loss of the (N+1)-th micro batch of the calibration
step N          when N optimizer steps are done
write N         before it writes the (N+1)-th file of checkpoint-6
torn N          when it has written one half of that file
rotate N        when N files of an older checkpoint have been removed
"""

from __future__ import annotations

import io
import os
import signal
import sys
from pathlib import Path

import safetensors.torch
import torch
from peft import peft_model
from transformers import TrainerCallback

FOLDER = "checkpoint-6"
_WRITING = os.O_WRONLY | os.O_RDWR


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def arrange_death(trainer, point: str) -> None:
    where, _, number = point.partition(" ")
    count = int(number)
    if where == "calibration":
        _in_calibration(trainer, count)
    elif where == "step":
        trainer.add_callback(_AtStep(count))
    elif where == "rotate":
        _in_removing(count)
    else:
        _in_writing(count, torn=where == "torn")


class _AtStep(TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            die()


def _in_calibration(trainer, count: int) -> None:
    compute_loss, calls = trainer.compute_loss, []

    def compute(*args, **kwargs):
        if len(calls) == count:
            die()
        calls.append(1)
        return compute_loss(*args, **kwargs)

    trainer.compute_loss = compute


def _in_removing(count: int) -> None:
    unlink, removed = os.unlink, []

    def remove(path, *args, **kwargs):
        folder = os.readlink(f"/proc/self/fd/{kwargs['dir_fd']}") if "dir_fd" in kwargs else ""
        if "checkpoint-" in f"{folder}/{path}" and not str(path).startswith("."):
            if len(removed) == count:
                die()
            removed.append(path)
        return unlink(path, *args, **kwargs)

    os.unlink = remove


def _in_writing(count: int, torn: bool) -> None:
    """Python's files by an audit hook; torch and safetensors open theirs in native code."""
    written: list[str] = []

    def begins(path: str, content=None) -> None:
        if FOLDER not in str(path):
            return
        if len(written) == count:
            written.append("")  # the half of it is a file too
            if torn:
                half = content() if content else b"{"
                Path(path).write_bytes(half[: len(half) // 2])
            die()
        written.append(str(path))

    torch_save, save_file = torch.save, safetensors.torch.save_file

    def save(value, path, *args, **kwargs):
        def content() -> bytes:
            buffer = io.BytesIO()
            torch_save(value, buffer)
            return buffer.getvalue()

        begins(path, content)
        return torch_save(value, path, *args, **kwargs)

    def save_tensors(tensors, path, metadata=None):
        begins(path, lambda: safetensors.torch.save(tensors, metadata))
        return save_file(tensors, path, metadata)

    torch.save, safetensors.torch.save_file = save, save_tensors
    peft_model.safe_save_file = save_tensors

    def opened(event: str, arguments: tuple) -> None:
        if event == "open" and isinstance(arguments[0], str) and arguments[2] & _WRITING:
            begins(arguments[0])

    sys.addaudithook(opened)

"""The other processes of a run: how many, and sums over all of them."""

from __future__ import annotations

import torch
import torch.distributed as dist


def world_size() -> int:
    """Number of processes; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def process_rank() -> int:
    """This process's number, from 0; 0 without torch.distributed."""
    return dist.get_rank() if world_size() > 1 else 0


def sum_over_processes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add each tensor up over all processes in fp64, in one reduction; all get the same bits.

    Args:
        tensors: the same names and shapes on every process; not modified.
    """
    if world_size() == 1 or not tensors:
        return tensors
    flat = torch.cat([t.double().flatten() for t in tensors.values()])
    flat = flat.to(communication_device(flat.device))
    dist.all_reduce(flat)
    parts = flat.split([t.numel() for t in tensors.values()])
    return {
        name: part.view(tensor.shape).to(tensor.device)
        for (name, tensor), part in zip(tensors.items(), parts, strict=True)
    }


def mean_over_processes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As `sum_over_processes`, divided by the number of processes."""
    if world_size() == 1:
        return tensors
    return {name: total / world_size() for name, total in sum_over_processes(tensors).items()}


def any_process(flag: bool) -> bool:
    """Whether the flag is set on any process; all of them must ask."""
    return bool(sum_over_processes({"flag": torch.tensor(float(flag))})["flag"])


def from_main_process(value):
    """A value as process 0 has it, on all processes; anything that can be pickled."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def wait_for_all() -> None:
    """Return when every process has come here."""
    if world_size() > 1:
        dist.barrier()


def communication_device(device: torch.device) -> torch.device:
    """Where a tensor on `device` must go to be communicated: NCCL knows no CPU memory."""
    # a CUDA build of torch names its accelerator on machines without one, too
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if device.type != "cpu" or accelerator is None or "gloo" in dist.get_backend():
        return device
    return torch.device(accelerator.type, torch.accelerator.current_device_index())

"""Who else takes part in a run: the engine that trains, and sums over its processes."""

from __future__ import annotations

import torch
import torch.distributed as dist

from .errors import SpftError


def world_size() -> int:
    """Number of processes; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def mean_over_processes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Average each tensor over all processes, in one reduction; every process gets the same bits.

    Args:
        tensors: the same names and shapes on every process; not modified.
    """
    if world_size() == 1:
        return tensors
    flat = torch.cat([t.double().flatten() for t in tensors.values()])
    dist.all_reduce(flat)
    flat /= world_size()
    parts = flat.split([t.numel() for t in tensors.values()])
    return {
        name: part.view_as(tensor)
        for (name, tensor), part in zip(tensors.items(), parts, strict=True)
    }


def refuse_unsupported_engine(trainer) -> None:
    """Refuse engines that hold weights or compact rows sharded: not supported yet.

    Raises:
        SpftError: names the engine.
    """
    for engine, used in (
        ("DeepSpeed", getattr(trainer, "is_deepspeed_enabled", False)),
        ("FSDP", getattr(trainer, "is_fsdp_enabled", False)),
        ("torch.nn.DataParallel", trainer.args.n_gpu > 1),
    ):
        if used:
            raise SpftError(
                f"SPFT does not train under {engine} yet; use one process, or DDP "
                "(accelerate launch --multi_gpu) without deepspeed and fsdp settings"
            )

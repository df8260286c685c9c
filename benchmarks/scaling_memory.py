"""Memory that a process needs, by formula.

docs/scaling.md states the assumptions.
"""

from __future__ import annotations

from scaling_bytes import FP32, accumulated
from scaling_model import Model, Run, numel, sharded_numel

WHOLE = ("ddp", "zero1", "zero2")  # stages under which a process holds whole weights
GIB = 2**30
# Elements that DeepSpeed gathers at most: stage3_max_live_parameters
LIVE = 10**9


def memory(model: Model, run: Run, method: str = "spft") -> dict[str, int]:
    """Bytes of each process, without activations, buckets and the framework's own.

    Returns:
        base: the model's weights; gathered: what sharded weights take while they are whole, at
        most; values, gradients, master, moments: of the trained parameters, master being fp32
        copies and moments AdamW's; kept: W0's rows under write-through.
    """
    whole, world = run.stage in WHOLE, run.world
    b, c = run.base_bytes, run.trained_bytes(method)
    trained = model.trained(method)
    count = numel(trained)
    part = -(-sharded_numel(trained, run) // world) if world > 1 and run.stage != "ddp" else count
    base = numel(model.base) if whole else -(-sharded_numel(model.base, run) // world)
    # a DDP or FSDP2 run in fp32 steps its parameters themselves, DeepSpeed always a copy
    master = 0 if run.stage in ("ddp", "fsdp2") and c == FP32 else FP32 * part
    values = 0 if method == "full" else c * (count if whole else part)
    gradients = c * (count if run.stage in ("ddp", "zero1") else part)
    return {
        "base": base * b,
        "gathered": 0 if whole or world == 1 else _gathered(model, run) * b,
        "values": values,
        "gradients": gradients,
        "master": master,
        "moments": 2 * FP32 * part,
        "kept": count * b if method == "spft" and whole else 0,
    }


def _gathered(model: Model, run: Run) -> int:
    """Elements: FSDP2 holds what is outside of the blocks, a block and the next one."""
    if run.stage == "fsdp2":
        return numel(model.outer) + 2 * numel(model.block_weights)
    return min(LIVE, numel(model.base))


def accumulator_bytes(model: Model, run: Run, stability: bool = True) -> int:
    """taylor's fp32 accumulators on each process, and the largest layer's gradient."""
    largest = max(o * i for i, o in model.linears)
    return FP32 * ((2 if stability else 1) * accumulated(model, run) // run.world + largest)

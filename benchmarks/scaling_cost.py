"""Memory that a process needs and time that a step takes, by formula; no GPU has been measured.

docs/scaling.md states the assumptions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from scaling_bytes import FP32, Payload, accumulated, calibration_payload, step_payload
from scaling_model import Model, Run, numel, sharded_numel

WHOLE = ("ddp", "zero1", "zero2")  # stages under which a process holds whole weights
GIB = 2**30
BUCKET = 25 * 2**20  # bytes that DDP reduces together
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


@dataclass(frozen=True)
class Cluster:
    """GPUs and what connects them.

    Attributes:
        peak: FLOP/s of one GPU in the dtype of the base.
        mfu: share of it that matrix products reach.
        node: GPUs of a node.
        intra, inter: bytes/s that a ring through all GPUs of a node moves along every link, and
            that it moves between two nodes, over all network cards of a node together.
        alpha_intra, alpha_inter: seconds that a step of the ring takes beside its bytes.
    """

    peak: float = 989e12
    mfu: float = 0.4
    node: int = 8
    intra: float = 300e9
    inter: float = 320e9
    alpha_intra: float = 5e-6
    alpha_inter: float = 10e-6


def flops_per_token(model: Model, run: Run, method: str, seq_len: int) -> float:
    """Of forward and backward. N: weights of all products, the head's included.

    The backward through a frozen model forms the gradients of activations alone: 2 N forward and
    2 N backward, where full fine-tuning has 4 N backward. Causal attention adds 2 s d a layer
    forward and twice that backward, for every method.
    """
    products = sum(i * o for i, o in model.linears) + model.size.vocab * model.size.hidden
    attention = 2 * seq_len * model.size.hidden * model.size.layers
    trained = numel(model.trained(method))
    own = {
        # write-through: grad_delta alone; the delta path: its own forward and backward
        "spft": (2 if run.stage in WHOLE else 6) * trained,
        "lora": 6 * trained,
        "full": 2 * products,
    }[method]
    recomputed = 2 * products + attention if run.checkpointing else 0
    return 4 * products + 3 * attention + own + recomputed


def collective_seconds(payload: Payload, calls: dict[str, int], world: int, on: Cluster) -> float:
    """Alpha-beta model of ring collectives, one after the other."""
    if world == 1:
        return 0.0
    nodes, local = math.ceil(world / on.node), min(world, on.node)
    bandwidth = on.intra if nodes == 1 else min(on.intra, on.inter)
    latency = (local - 1) * on.alpha_intra + (nodes - 1) * on.alpha_inter
    seconds = 0.0
    for kind, nbytes in payload.items():
        rounds = 2 if kind == "all_reduce" else 1
        seconds += rounds * calls.get(kind, 1) * latency
        seconds += rounds * nbytes * (world - 1) / world / bandwidth
    return seconds


def step_calls(model: Model, run: Run, payload: Payload) -> dict[str, int]:
    """Number of collectives of a step: DDP's buckets, else one for each block and for the rest."""
    groups = (model.size.layers + 1) * run.accumulation
    passes = 3 if run.checkpointing and run.stage == "zero3" else 2
    return {
        "all_reduce": math.ceil(payload.get("all_reduce", 0) / BUCKET),
        "all_gather": passes * groups if run.stage not in WHOLE else 1,
        "reduce_scatter": groups,
    }


def step_seconds(
    model: Model, run: Run, method: str, tokens: int, seq_len: int, on: Cluster
) -> tuple[float, float]:
    """Compute and communication of an optimizer step of `tokens` on each GPU.

    With perfect overlap a step takes the larger of the two, with none their sum.
    """
    payload = step_payload(model, run, method)
    compute = tokens * flops_per_token(model, run, method, seq_len) / (on.peak * on.mfu)
    calls = step_calls(model, run, payload)
    return compute, collective_seconds(payload, calls, run.world, on)


def calibration_seconds(
    model: Model, run: Run, metric: str, batches: int, tokens: int, seq_len: int, on: Cluster
) -> tuple[float, float]:
    """As `step_seconds`, for a whole calibration by group_taylor or taylor."""
    frozen = flops_per_token(model, replace(run, stage="ddp"), "spft", seq_len)
    frozen -= 2 * numel(model.compact)
    if metric == "taylor":
        frozen += 2 * sum(i * o for i, o in model.linears)
    payload = calibration_payload(model, run, metric, batches)
    micro = batches * run.accumulation
    calls = {
        "all_gather": 2 * micro * (model.size.layers + 1) if run.stage not in WHOLE else 1,
        "reduce_scatter": micro * len(model.linears),
    }
    compute = batches * tokens * frozen / (on.peak * on.mfu)
    return compute, collective_seconds(payload, calls, run.world, on)

"""Bytes that training and calibration send, by formula.

docs/scaling.md explains the formulas; tests/distributed/test_traffic.py counts real runs by them.

Payload of a collective: the whole tensor that the processes have together, i.e. what all get of a
gather and what each puts into a reduction. On the wire a ring sends `WIRE_FACTOR` times that.
Tensors of the same kind are summed, whatever the number of calls.
"""

from __future__ import annotations

from collections import Counter

from scaling_model import Model, Run, numel, sharded_numel

METRICS = ("group_taylor", "taylor", "zo_taylor", "wanda", "magnitude")
FP32, FP64, INT64 = 4, 8, 8  # bytes
# What a ring sends and receives on each process, over the payload, with n processes.
WIRE_FACTOR = {
    "all_reduce": lambda n: 2 * (n - 1) / n,
    "all_gather": lambda n: (n - 1) / n,
    "reduce_scatter": lambda n: (n - 1) / n,
    "broadcast": lambda n: (n - 1) / n,
}
Payload = dict[str, int]  # kind of collective -> bytes


def step_payload(model: Model, run: Run, method: str = "spft") -> Payload:
    """Payload of one optimizer step in the steady state, without `step_bookkeeping`."""
    if run.world == 1:
        return {}
    trained, micro = model.trained(method), run.accumulation
    gradients = numel(trained) * run.trained_bytes(method)
    own = sharded_numel(trained, run) * run.trained_bytes(method)
    if run.stage == "ddp":
        return {"all_reduce": gradients}
    if run.stage in ("zero1", "zero2"):
        # DeepSpeed averages by all-reduce and keeps its part; ZeRO-2 after each micro batch
        times = micro if run.stage == "zero2" else 1
        return {"all_reduce": times * gradients, "all_gather": own}
    gathers = base_gathers(model, run, micro, backward=True, training=method == "spft")
    if method != "full":
        gathers += compact_gathers(model, run, own)
    if run.reuse:
        gathers = sharded_numel(model.base, run) * run.base_bytes + own
    reductions = micro if run.stage == "zero3" else 1
    return {"all_gather": gathers, "reduce_scatter": reductions * own}


def base_gathers(
    model: Model, run: Run, passes: int, backward: bool, training: bool = False
) -> int:
    """Bytes of base weights gathered for some forwards, with or without their backwards.

    ZeRO-3 gathers a module's weights when it comes to it and gives them up after it: in the
    forward, in a recomputation and in the backward, a tied embedding for either use. What is said
    here holds where nothing is reused, which DeepSpeed does with most of a large model. FSDP2
    gathers a block once for recomputation and backward together.

    Args:
        training: only the deltas need gradients, so without checkpointing the backward ends at the
            first block's deltas. While calibrating it goes on to the embedding's output.
    """
    if run.stage not in ("zero3", "fsdp2"):
        return 0

    def size(shapes):
        return sharded_numel(shapes, run) * run.base_bytes

    if run.stage == "fsdp2":
        return passes * (2 if backward else 1) * size(model.base)
    table, norm = size(model.outer[:1]), size(model.outer[-1:])
    blocks = size(model.block_weights) * model.size.layers
    forward = 2 * table + norm + blocks  # the embedding and the head
    if not backward:
        return passes * forward
    if run.checkpointing:
        # the embedding's backward has no input, which would give it up: the next forward finds it
        return passes * (2 * forward + blocks) - (passes - 1) * table
    ends = size([(o, i) for i, o in (model.block[n] for n in "qkv")] + [(model.size.hidden,)])
    return passes * (2 * forward - table - (ends if training else 0))


def compact_gathers(model: Model, run: Run, own: int) -> int:
    """Bytes of compact rows gathered in the forwards and backwards of one training step."""
    micro = run.accumulation
    if run.stage == "fsdp2":
        return 2 * micro * own
    if run.checkpointing:
        return 3 * micro * own
    # the first block's q, k and v deltas have an input without gradient, see the embedding above
    kept = [(model.rows(o), i) for i, o in (model.block[n] for n in "qkv")]
    return 2 * micro * own - (micro - 1) * sharded_numel(kept, run) * run.compact_bytes


def step_bookkeeping(model: Model, run: Run) -> Payload:
    """What the Trainer and the engine send beside it in every step, with logging at each.

    From every process the count of target tokens (int64), its loss and its count of FLOPs (fp32);
    DeepSpeed's overflow flag and norm; FSDP2's norms for clipping; DDP's broadcast of buffers: the
    rotary frequencies.
    """
    found: Counter[str] = Counter(all_gather=(INT64 + 2 * FP32) * run.world)
    if run.stage in ("zero1", "zero2"):
        found["all_reduce"] = FP32
    if run.stage == "zero3":
        found["all_reduce"] = FP64
    if run.stage == "fsdp2":
        found["all_reduce"] = FP32 * len(model.compact)
    if run.stage == "ddp":
        found["broadcast"] = ddp_buffers(model)
    return dict(found)


def ddp_buffers(model: Model) -> int:
    """Bytes of the buffers that DDP broadcasts before a step's forward: rotary frequencies, twice.

    Which neurons are selected is not sent: every process selects them itself.
    """
    return 2 * FP32 * (model.size.hidden // model.size.heads // 2)


def calibration_payload(
    model: Model,
    run: Run,
    metric: str,
    batches: int = 8,
    directions: int = 5,
    stability: bool = True,
) -> Payload:
    """Payload of a whole calibration, from the first batch to the fingerprints of its file.

    Args:
        batches: optimizer steps' worth of data, at least 2 for the scores of two halves.
        directions: of zo_taylor.
        stability: keep two halves of the data apart.
    """
    if run.world == 1:
        return {}
    layers, neurons = len(model.linears), sum(o for _, o in model.linears)
    inputs = sum(i for i, _ in model.linears)
    micro = batches * run.accumulation
    parts = 2 if stability else 1
    kinds = 3 if stability else 1  # of scores: all batches, either half
    numbers = 16 * (layers + 1)  # fp64, of the model's fingerprint
    found: Counter[str] = Counter()
    if metric != "magnitude":
        numbers += layers + 3  # layers that no data reached; the data's fingerprint
        found["all_gather"] = INT64 * run.world * batches  # counts of target tokens
    if metric == "group_taylor":
        numbers += kinds * neurons + batches  # scores; whether a kernel overwrote outputs
    elif metric == "taylor":
        numbers += kinds * neurons + micro + batches  # one question a round through the layers
        found["reduce_scatter"] = micro * FP32 * accumulated(model, run)
        found["broadcast"] = 2 * parts * INT64 * layers  # their agreed order, twice
    elif metric == "zo_taylor":
        # halves of the directions and the weights' sizes, for the rank correlation
        numbers += (parts + 4) * neurons + 2 * directions * batches
    elif metric == "wanda":
        numbers += kinds * (inputs + neurons) + inputs - layers
    else:
        numbers += neurons
    found["all_reduce"] = FP64 * numbers
    backward = metric in ("group_taylor", "taylor")
    if metric != "magnitude":
        passes = micro * (2 * directions if metric == "zo_taylor" else 1)
        found["all_gather"] += base_gathers(model, run, passes, backward)
        if run.stage == "fsdp2":  # its groups hold the deltas too
            own = sharded_numel(model.compact, run) * run.compact_bytes
            found["all_gather"] += passes * (2 if backward else 1) * own
    return {kind: nbytes for kind, nbytes in found.items() if nbytes}


def accumulated(model: Model, run: Run) -> int:
    """Elements of taylor's accumulators on all processes, padding included."""
    weights = [(d_out, d_in) for d_in, d_out in model.linears]
    rows_of = run.world if run.stage == "fsdp2" else 1
    return numel(weights, rows_of=rows_of, numel_of=run.world)


def wire_bytes(payload: Payload, world: int) -> float:
    """Bytes that each process sends in a ring."""
    return sum(nbytes * WIRE_FACTOR[kind](world) for kind, nbytes in payload.items())

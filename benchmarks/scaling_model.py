"""Bytes that training and calibration send, and memory that a process needs, by formula.

docs/scaling.md explains the formulas; tests/distributed/test_traffic.py counts real runs by them.

Payload of a collective: the whole tensor that the processes have together, i.e. what all get of a
gather and what each puts into a reduction. On the wire a ring sends `WIRE_FACTOR` times that.
Tensors of the same kind are summed, whatever the number of calls.
"""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property

from workload import SIZES, Size

SHAPES = {**SIZES, "70b": Size(8192, 28672, 80, 64, 8, 128256, False, 640)}  # Llama-3.1-70B
STAGES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
METHODS = ("spft", "lora", "full")
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


def padded(number: int, multiple: int) -> int:
    """The next multiple."""
    return -(-number // multiple) * multiple


@dataclass(frozen=True)
class Model:
    """A Llama's shape and the neurons that are trained in each of its linear layers.

    Attributes:
        r: of every layer; None where `density` is given.
        density: share of each layer's neurons instead.
    """

    size: Size
    r: int | None
    density: float | None = None

    @cached_property
    def block(self) -> dict[str, tuple[int, int]]:
        """Linear layers of one decoder block: name -> (d_in, d_out)."""
        hidden, inner = self.size.hidden, self.size.intermediate
        keys = self.size.kv_heads * hidden // self.size.heads
        return {
            "q": (hidden, hidden),
            "k": (hidden, keys),
            "v": (hidden, keys),
            "o": (hidden, hidden),
            "gate": (hidden, inner),
            "up": (hidden, inner),
            "down": (inner, hidden),
        }

    @cached_property
    def linears(self) -> list[tuple[int, int]]:
        """(d_in, d_out) of all targeted layers."""
        return list(self.block.values()) * self.size.layers

    def rows(self, d_out: int) -> int:
        """Neurons trained in a layer."""
        if self.density is not None:
            return max(1, min(d_out, round(self.density * d_out)))
        return min(self.r, d_out)

    @cached_property
    def compact(self) -> list[tuple[int, int]]:
        """Shapes (r, d_in) of the trained tensors."""
        return [(self.rows(d_out), d_in) for d_in, d_out in self.linears]

    @cached_property
    def lora_rank(self) -> int:
        """The rank whose number of parameters is nearest to SPFT's."""
        return max(1, round(numel(self.compact) / sum(map(sum, self.linears))))

    @cached_property
    def base(self) -> list[tuple[int, ...]]:
        """Shapes of all base weights as stored; a tied head is the embedding's."""
        return [*self.outer, *self.block_weights * self.size.layers]

    @cached_property
    def outer(self) -> list[tuple[int, ...]]:
        """What belongs to no block: embedding, untied head, last norm."""
        table = (self.size.vocab, self.size.hidden)
        return [table, *([] if self.size.tied else [table]), (self.size.hidden,)]

    @cached_property
    def block_weights(self) -> list[tuple[int, ...]]:
        """Of one block: its linear layers and two norms."""
        return [(d_out, d_in) for d_in, d_out in self.block.values()] + [(self.size.hidden,)] * 2

    def trained(self, method: str) -> list[tuple[int, ...]]:
        """Shapes of the parameters that a method trains."""
        if method == "spft":
            return self.compact
        if method == "full":
            return self.base
        factors = [((self.lora_rank, i), (o, self.lora_rank)) for i, o in self.linears]
        return [shape for pair in factors for shape in pair]


def numel(shapes: list[tuple[int, ...]], rows_of: int = 1, numel_of: int = 1) -> int:
    """Elements of some tensors, each with its rows or its elements padded to a multiple."""
    return sum(
        padded(padded(shape[0], rows_of) * math.prod(shape[1:]), numel_of) for shape in shapes
    )


@dataclass(frozen=True)
class Run:
    """How a model is trained.

    Attributes:
        accumulation: micro batches of one optimizer step.
        base_bytes, compact_bytes: of an element of the base weights and of what is trained, in the
            dtype in which the engine holds and sends them.
    """

    stage: str
    world: int
    accumulation: int = 1
    checkpointing: bool = False
    base_bytes: int = 2
    compact_bytes: int = 4

    def trained_bytes(self, method: str) -> int:
        return self.base_bytes if method == "full" else self.compact_bytes


def sharded_numel(shapes: list[tuple[int, ...]], run: Run) -> int:
    """Elements with the padding of the stage that shards them."""
    if run.stage == "fsdp2":  # whole rows of each tensor
        return numel(shapes, rows_of=run.world)
    if run.stage == "zero3":  # each tensor, flattened
        return numel(shapes, numel_of=run.world)
    return padded(numel(shapes), 2 * run.world)  # ZeRO-1, 2: all of them, flattened


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
    reductions = micro if run.stage == "zero3" else 1
    return {"all_gather": gathers, "reduce_scatter": reductions * own}


def base_gathers(
    model: Model, run: Run, passes: int, backward: bool, training: bool = False
) -> int:
    """Bytes of base weights gathered for some forwards, with or without their backwards.

    ZeRO-3 gathers a module's weights when it comes to it and gives them up after it: in the forward,
    in a recomputation and in the backward, a tied embedding for either use. What is said here holds
    where nothing is reused (`stage3_max_reuse_distance`), as DeepSpeed does with most of a large
    model. FSDP2 gathers a block once for recomputation and backward together.

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

    The count of target tokens (int64) and two fp32 numbers for the logs from every process;
    DeepSpeed's overflow flag and norm; FSDP2's norms for clipping; DDP's broadcast of buffers: each
    layer's index and flag, and the rotary frequencies.
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


def ddp_buffers(model: Model, method: str = "spft") -> int:
    """Bytes of the buffers that DDP broadcasts before a step's forward."""
    rotary = 2 * FP32 * (model.size.hidden // model.size.heads // 2)
    if method != "spft":
        return rotary
    return rotary + sum(INT64 * rows + 1 for rows, _ in model.compact)


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
        found["reduce_scatter"] = micro * FP32 * _accumulated(model, run)
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
        # FSDP2's groups hold the deltas too; under ZeRO-3 the layer's look at one gathers it,
        # but for recomputed layers
        if run.stage == "fsdp2" or (
            run.stage == "zero3" and not (run.checkpointing and backward)
        ):
            own = sharded_numel(model.compact, run) * run.compact_bytes
            found["all_gather"] += passes * (2 if backward else 1) * own
    return {kind: nbytes for kind, nbytes in found.items() if nbytes}


def _accumulated(model: Model, run: Run) -> int:
    """Elements of taylor's accumulators on all processes, padding included."""
    weights = [(d_out, d_in) for d_in, d_out in model.linears]
    rows_of = run.world if run.stage == "fsdp2" else 1
    return numel(weights, rows_of=rows_of, numel_of=run.world)


def wire_bytes(payload: Payload, world: int) -> float:
    """Bytes that each process sends in a ring."""
    return sum(nbytes * WIRE_FACTOR[kind](world) for kind, nbytes in payload.items())

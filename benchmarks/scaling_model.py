"""A model by its shapes, and how it is run: what the formulas of docs/scaling.md work on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

from workload import SIZES, Size

TINY = Size(32, 48, 2, 4, 2, 260, True, 5)  # what tests/distributed counts on
SHAPES = {**SIZES, "70b": Size(8192, 28672, 80, 64, 8, 128256, False, 640)}  # Llama-3.1-70B
STAGES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")


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
        reuse: ZeRO-3 keeps what a forward has gathered for its backward, as it does with models
            within its limits (`stage3_max_reuse_distance`, `stage3_max_live_parameters`: 1e9
            elements each). Only one micro batch without checkpointing is told by formula.
    """

    stage: str
    world: int
    accumulation: int = 1
    checkpointing: bool = False
    base_bytes: int = 2
    compact_bytes: int = 4
    reuse: bool = False

    def trained_bytes(self, method: str) -> int:
        return self.base_bytes if method == "full" else self.compact_bytes


def sharded_numel(shapes: list[tuple[int, ...]], run: Run) -> int:
    """Elements with the padding of the stage that shards them."""
    if run.stage == "fsdp2":  # whole rows of each tensor
        return numel(shapes, rows_of=run.world)
    if run.stage == "zero3":  # each tensor, flattened
        return numel(shapes, numel_of=run.world)
    return padded(numel(shapes), 2 * run.world)  # ZeRO-1, 2: all of them, flattened

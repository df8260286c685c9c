"""What of a weight each process holds, and reading and writing neurons of sharded weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import prod

import torch

from .processes import any_process, process_rank, sum_over_processes, world_size

_SHARDINGS: dict[str, Sharding] = {}  # those of the files in `engines`


class Sharding:
    """How an engine holds parameters of which each process has but a part, for good.

    Making a subclass makes it known. Every one cuts the stored parameter, flattened, into one
    contiguous range a process: ranges are disjoint, their union is the parameter, and the last ones
    may be shorter or empty.

    Attributes:
        kind: what `ShardLayout` calls it.
    """

    kind: str

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        _SHARDINGS[cls.kind] = cls()

    def holds(self, parameter: torch.Tensor) -> bool:
        """Whether a parameter is held so."""
        raise NotImplementedError

    def shape(self, parameter: torch.Tensor) -> tuple[int, ...]:
        """Shape over all processes."""
        return tuple(parameter.shape)

    def block(self, parameter: torch.Tensor) -> int:
        """Elements of a process's range, padding included."""
        raise NotImplementedError

    def refuse_layout(self, weight: torch.Tensor) -> None:
        """Refuse a weight that is sharded over some of the processes only, or in another way.

        Raises:
            SpftError: says how it is sharded.
        """

    def local(self, parameter: torch.Tensor) -> torch.Tensor:
        """This process's range, flat, sharing its memory; padding may follow."""
        raise NotImplementedError

    def whole_copy(self, parameter: torch.Tensor) -> torch.Tensor | None:
        """The copy that forwards read, where this process holds the whole as well."""
        return None

    def whole_in_forward(self, module: torch.nn.Module, parameter: torch.nn.Parameter):
        """See the function of that name."""
        return parameter


def sharding_of(parameter: torch.Tensor) -> Sharding | None:
    """How a parameter is sharded; None where this process holds it whole."""
    return next((s for s in _SHARDINGS.values() if s.holds(parameter)), None)


def range_of_block(block: int, numel: int, rank: int) -> tuple[int, int]:
    """Start and stop of a process's block of elements, cut off where there are no more."""
    start = min(rank * block, numel)
    return start, min(start + block, numel)


def local_range(parameter: torch.Tensor) -> tuple[int, int]:
    """First element and number of elements of this process's range of a sharded parameter."""
    block, numel = sharding_of(parameter).block(parameter), whole_numel(parameter)
    start, stop = range_of_block(block, numel, process_rank())
    return start, stop - start


@dataclass(frozen=True)
class ShardLayout:
    """Which elements of a linear layer's weight each process holds.

    See `Sharding`. A replicated weight is cut into equal slices, the ranges that the processes work
    on.

    Attributes:
        rows, columns: shape of the weight as stored.
        neurons_are_columns: True for Conv1D, which stores (d_in, d_out).
        world: number of processes.
        block: elements of a process's range, padding included.
        kind: "replicated", or a `Sharding`'s.
    """

    rows: int
    columns: int
    neurons_are_columns: bool
    world: int
    block: int
    kind: str

    @classmethod
    def of(cls, weight: torch.Tensor, neurons_are_columns: bool = False) -> ShardLayout:
        """The layout of a live weight, whichever engine holds it.

        Raises:
            SpftError: it is sharded over some of the processes only, or along another dimension.
        """
        rows, columns = whole_shape(weight)
        sharding = sharding_of(weight)
        if sharding is None:
            return cls.replicated(rows, columns, neurons_are_columns)
        sharding.refuse_layout(weight)
        block = sharding.block(weight)
        return cls(rows, columns, neurons_are_columns, world_size(), block, sharding.kind)

    @classmethod
    def replicated(cls, rows: int, columns: int, neurons_are_columns: bool = False) -> ShardLayout:
        """The layout of a weight that every process has whole."""
        world = world_size()
        block = -(-rows * columns // world)
        return cls(rows, columns, neurons_are_columns, world, block, "replicated")

    @property
    def numel(self) -> int:
        return self.rows * self.columns

    def local_range(self, rank: int) -> tuple[int, int]:
        """Start and stop of a process's range in the flattened weight."""
        return range_of_block(self.block, self.numel, rank)

    def blocks(self, rank: int, most_rows: int) -> Iterator[Block]:
        """Rectangles of the stored weight that make up a process's range, in order.

        Args:
            most_rows: rows of a rectangle at most; none crosses a multiple of it.
        """
        start, stop = self.local_range(rank)
        at = start
        while at < stop:
            row, column = divmod(at, self.columns)
            if column or stop - at < self.columns:
                end = min(stop, (row + 1) * self.columns)
                yield Block(at - start, row, row + 1, column, column + end - at)
            else:
                rows = min(most_rows - row % most_rows, (stop - at) // self.columns)
                end = at + rows * self.columns
                yield Block(at - start, row, row + rows, 0, self.columns)
            at = end

    def selected_mask(self, index: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the selected neurons' elements lie that a process holds.

        Args:
            index: int64 (r,), distinct neurons.

        Returns:
            int64 (n,) positions in the process's range, and int64 (n,) positions of the same
            elements in the flattened compact (r, d_in) tensor.
        """
        d_in = self.rows if self.neurons_are_columns else self.columns
        inputs, index = torch.arange(d_in, device=index.device), index[:, None]
        if self.neurons_are_columns:
            flat = inputs * self.columns + index
        else:
            flat = index * self.columns + inputs
        flat = flat.flatten()
        start, stop = self.local_range(rank)
        held = ((flat >= start) & (flat < stop)).nonzero()[:, 0]
        return flat[held] - start, held


@dataclass(frozen=True)
class Block:
    """A rectangle of a stored weight within a process's range.

    Attributes:
        offset: of its first element in the range.
        row, row_stop, column, column_stop: its place in the stored weight.
    """

    offset: int
    row: int
    row_stop: int
    column: int
    column_stop: int

    def of(self, local: torch.Tensor) -> torch.Tensor:
        """The rectangle of a flat tensor that holds the process's range."""
        rows, columns = self.row_stop - self.row, self.column_stop - self.column
        return local[self.offset : self.offset + rows * columns].view(rows, columns)


def local_shard(weight: torch.Tensor, layout: ShardLayout) -> torch.Tensor:
    """This process's range of a weight, flat (without padding), sharing its memory."""
    start, stop = layout.local_range(process_rank())
    if layout.kind == "replicated":
        return weight.detach().reshape(-1)[start:stop]
    return _SHARDINGS[layout.kind].local(weight)[: stop - start]


def is_sharded(parameter: torch.Tensor) -> bool:
    """Whether this process holds but a part of a parameter for good (ZeRO-3, FSDP2)."""
    return sharding_of(parameter) is not None


def whole_in_forward(module: torch.nn.Module, parameter: torch.nn.Parameter | None):
    """A parameter of a module's child, to compute with in the module's own forward."""
    sharding = None if parameter is None else sharding_of(parameter)
    return parameter if sharding is None else sharding.whole_in_forward(module, parameter)


def local_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor; of FSDP2's, which are of global size, its own part."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def whole_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Shape of a parameter over all processes, sharded or not."""
    sharding = sharding_of(parameter)
    return tuple(parameter.shape) if sharding is None else sharding.shape(parameter)


def whole_numel(parameter: torch.Tensor) -> int:
    """Number of elements of a parameter over all processes, sharded or not."""
    return prod(whole_shape(parameter))


def any_nonzero(weight: torch.Tensor) -> bool:
    """Whether a (rows, columns) weight has an element that is not zero, on whichever process.

    Under an engine that shards the weight, all processes must ask.
    """
    layout = ShardLayout.of(weight)
    if layout.kind == "replicated":
        return bool(torch.count_nonzero(weight.detach()))
    return any_process(bool(torch.count_nonzero(local_shard(weight, layout))))


def read_neurons(weight: torch.Tensor, layout: ShardLayout, index: torch.Tensor) -> torch.Tensor:
    """The weights of some neurons, (r, d_in) in the weight's dtype; all processes must ask.

    Args:
        index: int64 (r,), the same on all processes.
    """
    dimension = 1 if layout.neurons_are_columns else 0
    if layout.kind == "replicated":
        rows = weight.detach().index_select(dimension, index.to(weight.device))
        return rows.t() if layout.neurons_are_columns else rows
    local = local_shard(weight, layout)
    here, there = layout.selected_mask(index.to(local.device), process_rank())
    d_in = layout.rows if layout.neurons_are_columns else layout.columns
    rows = torch.zeros(index.numel() * d_in, dtype=torch.float64, device=local.device)
    rows[there] = local[here].double()
    rows = sum_over_processes({"rows": rows})["rows"]
    return rows.view(-1, d_in).to(weight.device, local.dtype)


@torch.no_grad()
def write_neurons(
    weight: torch.Tensor, layout: ShardLayout, index: torch.Tensor, rows: torch.Tensor
) -> None:
    """Write (r, d_in) weights of some neurons into a weight; every process writes what it holds."""
    if layout.kind == "replicated":
        write_whole_neurons(weight, layout.neurons_are_columns, index, rows)
        return
    local = local_shard(weight, layout)
    here, there = layout.selected_mask(index.to(local.device), process_rank())
    local[here] = rows.to(local).flatten()[there]
    whole = _SHARDINGS[layout.kind].whole_copy(weight)
    if whole is not None:
        write_whole_neurons(whole, layout.neurons_are_columns, index, rows)


@torch.no_grad()
def write_whole_neurons(
    weight: torch.Tensor, neurons_are_columns: bool, index: torch.Tensor, rows: torch.Tensor
) -> None:
    """As `write_neurons`, into a weight that this process holds whole, without asking who does."""
    index, rows = index.to(weight.device), rows.to(weight)
    if neurons_are_columns:
        weight.index_copy_(1, index, rows.t())
    else:
        weight.index_copy_(0, index, rows)

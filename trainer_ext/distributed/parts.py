"""Which part of each trained parameter this process's optimizer steps, and where it lies."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import nn

from ..errors import SpftError
from .engines import Engine
from .processes import communication_device, process_rank, world_size
from .shards import local_tensor, range_of_block


@dataclass(frozen=True)
class Stepped:
    """The part of one trained parameter that this process's optimizer steps.

    Attributes:
        name: of the parameter in the model.
        parameter: the parameter, whole or as the engine leaves it.
        shape: of the whole parameter.
        tensor: what stands for it in the optimizer's groups: the parameter itself, FSDP2's
            DTensor, or a flat fp32 partition of ZeRO's that holds parts of other parameters too;
            None if this process steps nothing of it.
        start: the part's first element in the flattened local `tensor`.
        offset: the part's first element in the flattened whole parameter.
        numel: elements of the part; padding is left out.
    """

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    tensor: torch.Tensor | None
    start: int
    offset: int
    numel: int

    def part_of(self, values: torch.Tensor) -> torch.Tensor:
        """This parameter's part, flat, of a local tensor that is laid out as `tensor` is."""
        return values.reshape(-1)[self.start : self.start + self.numel]

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """The part, flat, of a tensor of the whole parameter's shape."""
        return whole.reshape(-1)[self.offset : self.offset + self.numel]

    def gather(self, parts: Iterable[torch.Tensor]) -> list[torch.Tensor] | None:
        """Whole tensors in fp32 on the CPU of process 0; all processes must ask.

        No other process holds a whole copy longer than the call.

        Args:
            parts: flat tensors of `numel` elements, the same number on every process.

        Returns:
            tensors of `shape`; None on the other processes.
        """
        parts = list(parts)
        here = parts[0].device if parts else torch.device("cpu")
        whole = torch.zeros(len(parts), prod(self.shape), device=communication_device(here))
        for row, part in zip(whole, parts, strict=True):
            row[self.offset : self.offset + self.numel] = part.to(row)
        if world_size() > 1:
            dist.reduce(whole, dst=0)  # every element comes from one process, so sums are exact
        if process_rank():
            return None
        return [row.view(self.shape).clone() for row in whole.cpu()]

    def values(self) -> torch.Tensor:
        """The part's values, flat, as they are stepped; not a copy."""
        if self.tensor is None:
            return self.parameter.new_zeros(0, dtype=torch.float32)
        return self.part_of(local_tensor(self.tensor).detach())

    @torch.no_grad()
    def fill(self, whole: torch.Tensor) -> None:
        """Take over the parameter's values: what is stepped, and what forwards read."""
        if self.tensor is not None:
            self.values().copy_(self.cut(whole))
        parameter = self.parameter
        if hasattr(parameter, "placements"):
            return  # it is what is stepped
        if hasattr(parameter, "ds_tensor"):
            parameter.ds_tensor.data.reshape(-1)[: self.numel].copy_(self.cut(whole))
        if parameter.numel() == whole.numel():  # whole here, for good or just now
            parameter.data.copy_(whole.view(parameter.shape))


def stepped_parameters(
    engine: Engine, optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter]
) -> list[Stepped]:
    """Where the trained parameters lie, in the order of `named`.

    Args:
        optimizer: as the trainer has it, in the wrappers of accelerate and DeepSpeed.
        named: name -> trained parameter of the prepared model, in the same order on all processes.

    Raises:
        SpftError: DeepSpeed's optimizer is of a kind whose layout is not known.
    """
    place: Callable[[str, nn.Parameter], Stepped]
    if engine.kind == "fsdp2":
        place = _of_fsdp2
    elif engine.kind == "deepspeed":
        place = _of_zero(optimizer.optimizer, engine.stage)
    else:
        place = _whole
    return [place(name, parameter) for name, parameter in named.items()]


def held_parameter(name: str, parameter: nn.Parameter) -> tuple[Stepped, torch.Tensor]:
    """What this process holds of a parameter that nothing steps, and where it lies, flat."""
    if hasattr(parameter, "placements"):
        stepped = _of_fsdp2(name, parameter)
        return stepped, stepped.values()
    if hasattr(parameter, "ds_tensor"):
        offset, numel = _zero3_range(parameter.ds_numel)
        shape = tuple(parameter.ds_shape)
        return (
            Stepped(name, parameter, shape, None, 0, offset, numel),
            parameter.ds_tensor.data[:numel],
        )
    shape, numel = tuple(parameter.shape), parameter.numel() if process_rank() == 0 else 0
    return (
        Stepped(name, parameter, shape, None, 0, 0, numel),
        parameter.detach().reshape(-1)[:numel],
    )


def innermost_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer without the wrappers of accelerate and DeepSpeed."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


@contextmanager
def whole_groups(engine: Engine, optimizer: torch.optim.Optimizer):
    """The innermost optimizer with all that it steps in its groups.

    ZeRO-3 puts its partitions there one by one, and only while it steps.
    """
    zero = optimizer.optimizer if engine.kind == "deepspeed" and engine.stage == 3 else None
    if zero is not None:
        zero._set_fp32_optimizer_param_groups()
    try:
        yield innermost_optimizer(optimizer)
    finally:
        if zero is not None:
            zero._clear_fp32_optimizer_param_groups()


def like_stepped(local: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Values of this process's part of `tensor`, as the kind of tensor that it is."""
    if not hasattr(tensor, "placements"):
        return local.view(tensor.shape)
    own = local.view(tensor.to_local().shape)
    return type(tensor.data).from_local(
        own, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride()
    )


def _whole(name: str, parameter: nn.Parameter) -> Stepped:
    shape = tuple(parameter.shape)
    return Stepped(name, parameter, shape, parameter, 0, 0, parameter.numel())


def _of_fsdp2(name: str, parameter: nn.Parameter) -> Stepped:
    shape = tuple(parameter.shape)
    block = -(-shape[0] // world_size()) * prod(shape[1:])
    start, stop = range_of_block(block, prod(shape), process_rank())
    assert parameter.to_local().numel() == stop - start
    return Stepped(name, parameter, shape, parameter, 0, start, stop - start)


def _zero3_range(numel: int) -> tuple[int, int]:
    """First element and number of elements of this process's slice, without padding."""
    block = -(-numel // world_size())
    start, stop = range_of_block(block, numel, process_rank())
    return start, stop - start


def _of_zero(optimizer, stage: int) -> Callable[[str, nn.Parameter], Stepped]:
    if stage == 3 and hasattr(optimizer, "grad_position"):

        def place(name: str, parameter: nn.Parameter) -> Stepped:
            group, start, _ = optimizer.grad_position[optimizer.get_param_id(parameter)]
            offset, numel = _zero3_range(parameter.ds_numel)
            flat = optimizer.fp32_partitioned_groups_flat[group]
            return Stepped(name, parameter, tuple(parameter.ds_shape), flat, start, offset, numel)

        return place
    if stage in (1, 2) and hasattr(optimizer, "single_partition_of_fp32_groups"):

        def place(name: str, parameter: nn.Parameter) -> Stepped:
            shape, mapping = tuple(parameter.shape), parameter._hp_mapping
            if mapping is None:
                return Stepped(name, parameter, shape, None, 0, 0, 0)
            flat = optimizer.single_partition_of_fp32_groups[mapping.param_group_index]
            there, here = mapping.hp_fragment_address, mapping.lp_fragment_address
            return Stepped(name, parameter, shape, flat, there.start, here.start, here.numel)

        return place
    raise SpftError(
        f"DeepSpeed steps with {type(optimizer).__name__} at ZeRO stage {stage}, which SPFT cannot "
        "save; drop data_types.grad_accum_dtype and similar keys from its configuration"
    )

"""Which part of each trained parameter this process's optimizer steps, and where it lies."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import torch
import torch.distributed as dist
from torch import nn

from .processes import communication_device, process_rank, world_size
from .shards import local_range, local_tensor, sharding_of, whole_shape


@dataclass(frozen=True)
class Part:
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
        sharding = sharding_of(self.parameter)
        if sharding is None:
            read = self.parameter.data
        else:
            sharding.local(self.parameter)[: self.numel].copy_(self.cut(whole))
            read = sharding.whole_copy(self.parameter)
        if read is not None:
            read.copy_(whole.view(read.shape))


def held_part(name: str, parameter: nn.Parameter) -> tuple[Part, torch.Tensor]:
    """What this process holds of a parameter that nothing steps, and where it lies, flat."""
    sharding = sharding_of(parameter)
    if sharding is None:  # all hold it; process 0 gives it
        offset, numel = 0, 0 if process_rank() else parameter.numel()
        held = parameter.detach().reshape(-1)
    else:
        offset, numel = local_range(parameter)
        held = sharding.local(parameter)
    return Part(name, parameter, whole_shape(parameter), None, 0, offset, numel), held[:numel]


def like_tensor(local: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """Values of this process's part of `tensor`, as the kind of tensor that it is."""
    if not hasattr(tensor, "placements"):
        return local.view(tensor.shape)
    own = local.view(tensor.to_local().shape)
    return type(tensor.data).from_local(
        own, tensor.device_mesh, tensor.placements, shape=tensor.shape, stride=tensor.stride()
    )

"""Dense per-layer sums over all processes, of which each process keeps its range alone.

Each process adds dense tensors for its layers as its backward reaches them, and each such tensor is
reduce-scattered at once, so that no more than one is alive. A collective needs all processes, but
a layer may be unused on one of them, used twice, or come in another order. So the layers have one
agreed order, and a process that comes to a layer first takes part with zeros in the turns of those
before it. Before each round through the order the processes agree whether anybody has more to add.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist

from ..distributed.processes import any_process, process_rank, world_size
from ..distributed.shards import ShardLayout

# renamed in torch 2.13
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
# Fills a (rows, columns) fp32 tensor.
Fill = Callable[[torch.Tensor], None]


class ShardedSums:
    """Running sums of stored-weight-shaped tensors, fp32, sharded as `layouts` say.

    Attributes:
        sums: layer name -> (layout.block,) on the accumulation device; the tail is padding.
    """

    def __init__(
        self,
        layouts: dict[str, ShardLayout],
        devices: dict[str, torch.device],
        offload: bool = False,
    ) -> None:
        """
        Args:
            devices: where each layer computes.
            offload: keep the sums in CPU memory.
        """
        self._layouts, self._devices = layouts, devices
        self.sums = {
            name: torch.zeros(layout.block, device="cpu" if offload else devices[name])
            for name, layout in layouts.items()
        }
        self._order = list(reversed(layouts))
        self._arrivals: dict[str, None] = {}
        self._agreed = 0  # how often the order has been agreed on
        self._turn: int | None = None  # place in the order whose turn it is; None between rounds

    def expect(self, name: str) -> None:
        """A layer's forward begins: its addition will probably come in the reverse order."""
        if not self._agreed:
            self._arrivals[name] = None

    def add(self, name: str, add_to: Fill, fill: Fill) -> None:
        """Add one dense tensor of this process to a layer's sum.

        Args:
            add_to: adds the tensor to the (rows, columns) fp32 tensor that it is given.
            fill: writes the tensor into it.
        """
        layout = self._layouts[name]
        if layout.world == 1:
            self._add_here(name, add_to, fill)
            return
        if not self._agreed:
            self._agree(reversed(self._arrivals))
        if self._agreed == 1:
            self._arrivals[name] = None
        place = self._order.index(name)
        if self._turn is not None and self._turn > place:
            self._pass_turns(len(self._order))
        if self._turn is None:
            any_process(True)
            self._turn = 0
        self._pass_turns(place)
        self._take_turn(fill)

    def finish(self) -> None:
        """End a batch: take part in whatever turns other processes still need."""
        if world_size() == 1:
            return
        if not self._agreed:
            self._agree(reversed(self._arrivals))
        if self._turn is not None:
            self._pass_turns(len(self._order))
        while any_process(False):
            self._turn = 0
            self._pass_turns(len(self._order))
        if self._agreed == 1:
            # From now on the order in which additions really came, which needs no empty turns.
            self._agree(self._arrivals)

    def _add_here(self, name: str, add_to: Fill, fill: Fill) -> None:
        layout, sums = self._layouts[name], self.sums[name]
        if sums.device == self._devices[name]:
            add_to(sums.view(layout.rows, layout.columns))
            return
        buffer = torch.empty(layout.rows, layout.columns, device=self._devices[name])
        fill(buffer)
        sums += buffer.view(-1).to(sums.device)

    def _agree(self, proposal) -> None:
        """Let all processes use the first one's proposal, completed by the layers it lacks."""
        names = list(self._layouts)
        order = [name for name in proposal if name in self._layouts]
        order += [name for name in reversed(names) if name not in set(order)]
        numbers = torch.tensor([names.index(name) for name in order])
        numbers = numbers.to(next(iter(self._devices.values())))
        dist.broadcast(numbers, src=0)
        self._order = [names[number] for number in numbers.tolist()]
        self._arrivals.clear()
        self._agreed += 1

    def _pass_turns(self, stop: int) -> None:
        """Take part with zeros until it is the turn of `stop`."""
        while self._turn is not None and self._turn < stop:
            self._take_turn(None)

    def _take_turn(self, fill: Fill | None) -> None:
        name = self._order[self._turn]
        layout, sums = self._layouts[name], self.sums[name]
        whole = torch.zeros(layout.world * layout.block, device=self._devices[name])
        if fill is not None:
            fill(whole[: layout.numel].view(layout.rows, layout.columns))
        rank = process_rank()
        # in place in this process's own range: no second buffer
        own = whole[rank * layout.block : (rank + 1) * layout.block]
        _reduce_scatter(own, whole)
        sums += own.to(sums.device)
        self._turn += 1
        if self._turn == len(self._order):
            self._turn = None

"""DDP: every process holds everything."""

from __future__ import annotations

from contextlib import nullcontext

from torch.nn.parallel import DistributedDataParallel

from ..engine import Engine
from ..processes import world_size


class DDP(Engine):
    """torch.nn.parallel.DistributedDataParallel."""

    name = "DDP"

    @classmethod
    def of(cls, trainer):
        others = trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled
        return cls() if world_size() > 1 and not others else None

    def wants_reentrant(self, trainer, reentrant):
        # The search for unused parameters does not go with the reentrant variant.
        searches = trainer.args.ddp_find_unused_parameters is not False
        return False if reentrant and searches else None

    def leave_buffers_alone(self, model, buffers):
        # DDP would broadcast them before every forward. Names that the model's own list of what to
        # leave out holds stay there.
        names = {*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), *buffers}
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)
        return nullcontext()

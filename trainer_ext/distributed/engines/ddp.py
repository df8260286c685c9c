"""DDP: every process holds everything."""

from __future__ import annotations

from contextlib import nullcontext

from torch.nn.parallel import DistributedDataParallel

from ..engine import Engine


class DDP(Engine):
    """torch.nn.parallel.DistributedDataParallel."""

    name = "DDP"

    @classmethod
    def of(cls, trainer):
        return None  # it is what several processes run under where no other engine says it is it

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

"""FSDP2: every process holds blocks of rows of every parameter, as DTensors."""

from __future__ import annotations

from contextlib import contextmanager
from math import prod

from ...errors import SpftError
from ..engine import Engine
from ..parts import Part
from ..processes import world_size
from ..shards import Sharding, local_range


class FSDP2(Engine):
    """torch.distributed.fsdp.fully_shard."""

    name = "FSDP2"
    divides_state = True

    @classmethod
    def of(cls, trainer):
        if not trainer.is_fsdp_enabled:
            return None
        if not trainer.accelerator.is_fsdp2:
            raise SpftError("SPFT does not train under FSDP1; set fsdp_version: 2")
        return cls()

    def refuse_unsupported(self, trainer):
        # FSDP2 puts plain parameters in the places of those that hold bitsandbytes' scales, unless
        # somebody has taught it otherwise, as Axolotl does.
        weights = [m.weight for m in trainer.model.modules() if type(m).__name__ == "Linear8bitLt"]
        held = [getattr(weight, "_local_tensor", weight) for weight in weights]
        if any(type(weight).__name__ != "Int8Params" for weight in held):
            raise SpftError(
                "the base is loaded in 8 bits, which bitsandbytes cannot compute with under plain "
                "FSDP2; load it in 4 bits, or use DDP, DeepSpeed or Axolotl"
            )

    @contextmanager
    def leave_buffers_alone(self, model, buffers):
        # Loading by one process takes everything in the state dict for a sharded parameter.
        left_out = []
        for name in buffers:
            module, _, buffer = name.rpartition(".")
            left_out.append((model.get_submodule(module)._non_persistent_buffers_set, buffer))
        for names, buffer in left_out:
            names.add(buffer)
        try:
            yield
        finally:
            for names, buffer in left_out:
                names.discard(buffer)

    def before_first_forward(self, model, wrapped):
        # In its first forward it notes the dtype of the parameters that require a gradient, and
        # casts gradients to that from then on.
        if hasattr(model, "unshard"):
            model._get_fsdp_state()._lazy_init()

    def parts(self, optimizer, named):
        return [_part(name, parameter) for name, parameter in named.items()]

    @staticmethod
    def release_gathered_weights(model, wrapped):
        for module in model.modules():
            if hasattr(module, "unshard") and hasattr(module, "reshard"):  # an FSDPModule
                module.reshard()


def _part(name, parameter) -> Part:
    offset, numel = local_range(parameter)
    assert parameter.to_local().numel() == numel
    return Part(name, parameter, tuple(parameter.shape), parameter, 0, offset, numel)


class RowBlocks(Sharding):
    """DTensors that are sharded by rows over all processes."""

    kind = "fsdp2"

    def holds(self, parameter):
        return hasattr(parameter, "placements")

    def block(self, parameter):
        rows, *others = parameter.shape
        return -(-rows // world_size()) * prod(others)

    def refuse_layout(self, weight):
        world = world_size()
        placements = [str(p) for p in weight.placements]
        if placements != ["S(0)"] or weight.device_mesh.size() != world:
            raise SpftError(
                f"the weights are sharded as {placements} over {weight.device_mesh.size()} of "
                f"{world} processes; SPFT needs FSDP2's full shard of rows over all of them"
            )
        if weight.device.type != weight.device_mesh.device_type:
            raise SpftError(
                "the weights are in CPU memory while the model computes elsewhere; SPFT does "
                "not work with FSDP2's parameter offload yet, so switch it off"
            )

    def local(self, parameter):
        return parameter.detach().to_local().reshape(-1)

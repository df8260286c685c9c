"""DeepSpeed's ZeRO: flat slices of the optimizer's state, and from stage 3 of every parameter."""

from __future__ import annotations

from contextlib import contextmanager

import torch.distributed as dist

from ...errors import SpftError
from ..engine import Engine, innermost_optimizer
from ..parts import Part
from ..processes import world_size
from ..shards import Sharding, local_range


class ZeRO(Engine):
    """DeepSpeed with ZeRO.

    Attributes:
        stage: 1, 2 or 3; 0 is refused.
    """

    steps_copies = True
    divides_state = True
    waits_in = ("/deepspeed/comm/",)

    def __init__(self, stage: int) -> None:
        self.stage = stage
        self.name = f"ZeRO-{stage}"

    @classmethod
    def of(cls, trainer):
        if not trainer.is_deepspeed_enabled:
            return None
        return cls(int(_config_of(trainer).get_value("zero_optimization.stage", 0)))

    def refuse_unsupported(self, trainer):
        config = _config_of(trainer)
        if self.stage == 0:
            raise SpftError(
                "zero_optimization.stage is 0 in the DeepSpeed configuration, which divides "
                "nothing; use stage 1, 2 or 3, or plain DDP without DeepSpeed"
            )
        for part in ("offload_optimizer", "offload_param"):
            device = config.get_value(f"zero_optimization.{part}.device", "none")
            if device not in ("none", "cpu", None):
                raise SpftError(
                    f"zero_optimization.{part}.device is {device!r} in the DeepSpeed "
                    "configuration; SPFT supports none and cpu"
                )
        if config.get_value("tensor_parallel.autotp_size", 0) > 1:
            raise SpftError(
                "tensor_parallel.autotp_size is set in the DeepSpeed configuration; SPFT does not "
                "support tensor parallelism, drop it"
            )

    def keeps_client_optimizer(self, trainer):
        # With its optimizer offloaded, DeepSpeed wants its own CPU Adam (compiled for minutes at
        # first use) in the place of any other, unless `zero_force_ds_cpu_optimizer` is false. The
        # state of selected neurons is small enough for torch's kernels, so that is what an unset
        # key is set to.
        config = _config_of(trainer)
        offload = config.get_value("zero_optimization.offload_optimizer.device", "none")
        if offload in ("none", None):
            return True
        # the dictionary itself: DeepSpeed is given it
        return not config.config.setdefault("zero_force_ds_cpu_optimizer", False)

    def wants_reentrant(self, trainer, reentrant):
        # Non-reentrant checkpointing finds gathered weights changed in its second forward
        # (CheckpointError), because stage 3 has freed them.
        return True if self.stage == 3 and not reentrant else None

    def before_first_forward(self, model, wrapped):
        # Stage 3 gathers the small parameters that it keeps whole after each step, into one buffer
        # of the first one's dtype. That fails for fp32 deltas (or LoRA's factors) of few rows
        # beside a 16-bit base's norms, so those of another dtype than most are divided.
        whole = getattr(getattr(wrapped, "optimizer", None), "persistent_parameters", None)
        if not whole:
            return
        dtypes = [parameter.ds_tensor.dtype for parameter in whole]  # what it holds and gathers
        kept = max(set(dtypes), key=lambda dtype: (dtypes.count(dtype), str(dtype)))
        for parameter in whole:
            parameter.ds_persist = parameter.ds_tensor.dtype == kept
        whole[:] = [parameter for parameter in whole if parameter.ds_persist]

    def parts(self, optimizer, named):
        zero = optimizer.optimizer
        if self.stage == 3 and hasattr(zero, "grad_position"):
            return [_part_of_stage_3(zero, *item) for item in named.items()]
        if self.stage in (1, 2) and hasattr(zero, "single_partition_of_fp32_groups"):
            return [_part_of_stage_1_or_2(zero, *item) for item in named.items()]
        raise SpftError(
            f"DeepSpeed steps with {type(zero).__name__} at ZeRO stage {self.stage}, which SPFT "
            "cannot save; drop data_types.grad_accum_dtype and similar keys from its configuration"
        )

    @contextmanager
    def whole_groups(self, optimizer):
        # Stage 3 puts its partitions there one by one, and only while it steps.
        zero = optimizer.optimizer
        if self.stage == 3:
            zero._set_fp32_optimizer_param_groups()
        try:
            yield innermost_optimizer(optimizer)
        finally:
            if self.stage == 3:
                zero._clear_fp32_optimizer_param_groups()

    @staticmethod
    def release_gathered_weights(model, wrapped):
        offload = getattr(getattr(wrapped, "optimizer", None), "parameter_offload", None)
        if offload is not None:  # stage 3
            offload.partition_all_parameters()


def _config_of(trainer):
    return trainer.accelerator.state.deepspeed_plugin.hf_ds_config


def _part_of_stage_3(zero, name, parameter) -> Part:
    group, start, _ = zero.grad_position[zero.get_param_id(parameter)]
    flat = zero.fp32_partitioned_groups_flat[group]
    offset, numel = local_range(parameter)
    return Part(name, parameter, tuple(parameter.ds_shape), flat, start, offset, numel)


def _part_of_stage_1_or_2(zero, name, parameter) -> Part:
    shape, mapping = tuple(parameter.shape), parameter._hp_mapping
    if mapping is None:
        return Part(name, parameter, shape, None, 0, 0, 0)
    flat = zero.single_partition_of_fp32_groups[mapping.param_group_index]
    there, here = mapping.hp_fragment_address, mapping.lp_fragment_address
    return Part(name, parameter, shape, flat, there.start, here.start, here.numel)


class Slices(Sharding):
    """Stage 3's parameters: flattened, and cut into equal slices."""

    kind = "zero3"

    def holds(self, parameter):
        return hasattr(parameter, "ds_tensor")

    def shape(self, parameter):
        return tuple(parameter.ds_shape)

    def block(self, parameter):
        return -(-parameter.ds_numel // world_size())

    def refuse_layout(self, weight):
        if dist.get_world_size(weight.ds_process_group) != world_size():
            raise SpftError(
                "the weights are partitioned over a part of the processes (MiCS, hpZ or expert "
                "groups); use plain ZeRO-3"
            )

    def local(self, parameter):
        return parameter.ds_tensor.data.reshape(-1)

    def whole_copy(self, parameter):
        # Small parameters stay gathered (stage3_param_persistence_threshold).
        whole = parameter.numel() == parameter.ds_numel
        return parameter.data.view(parameter.ds_shape) if whole else None

    def whole_in_forward(self, module, parameter):
        # It is whole in the forward of its own module only; told once, in this module's as well.
        if parameter.numel() == 0:
            from deepspeed import zero

            zero.register_external_parameter(module, parameter)
            parameter.all_gather()
        return parameter

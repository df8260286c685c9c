"""Which engine a trainer runs under, and what SPFT must do differently there."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.nn.parallel import DistributedDataParallel
from transformers import Trainer

from ..errors import SpftError
from .processes import world_size

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Engine:
    """What makes a trainer's processes one run.

    Attributes:
        kind: "none" (one process), "ddp", "deepspeed" or "fsdp2".
        stage: of DeepSpeed's ZeRO, else 0.
    """

    kind: str
    stage: int = 0

    @classmethod
    def of(cls, trainer: Trainer) -> Engine:
        """The engine of a trainer, as soon as it has been constructed.

        Raises:
            SpftError: SPFT does not train under it.
        """
        if trainer.args.n_gpu > 1:
            raise SpftError(
                "SPFT does not train under torch.nn.DataParallel; start one process a GPU "
                "(accelerate launch --multi_gpu), or show one GPU by CUDA_VISIBLE_DEVICES"
            )
        if trainer.is_deepspeed_enabled:
            config = trainer.accelerator.state.deepspeed_plugin.hf_ds_config
            return cls("deepspeed", int(config.get_value("zero_optimization.stage", 0)))
        if trainer.is_fsdp_enabled:
            if not trainer.accelerator.is_fsdp2:
                raise SpftError("SPFT does not train under FSDP1; set fsdp_version: 2")
            return cls("fsdp2")
        return cls("ddp" if world_size() > 1 else "none")

    @property
    def name(self) -> str:
        """As users call it: "one process", "DDP", "ZeRO-2", "FSDP2"."""
        names = {"none": "one process", "ddp": "DDP", "fsdp2": "FSDP2"}
        return names.get(self.kind, f"ZeRO-{self.stage}")

    @property
    def steps_copies(self) -> bool:
        """Whether the optimizer steps copies of the parameters, which the engine writes back."""
        return self.kind == "deepspeed"

    @property
    def divides_state(self) -> bool:
        """Whether each process holds but a part of the optimizer's state."""
        return self.kind in ("deepspeed", "fsdp2")


def refuse_unsupported_engine(trainer: Trainer) -> None:
    """Refuse what SPFT cannot train or save under.

    Raises:
        SpftError: names the engine or its setting.
    """
    engine = Engine.of(trainer)
    if engine.kind == "fsdp2":
        # FSDP2 puts plain parameters in the places of those that hold bitsandbytes' scales, unless
        # somebody has taught it otherwise, as Axolotl does.
        weights = [m.weight for m in trainer.model.modules() if type(m).__name__ == "Linear8bitLt"]
        held = [getattr(weight, "_local_tensor", weight) for weight in weights]
        if any(type(weight).__name__ != "Int8Params" for weight in held):
            raise SpftError(
                "the base is loaded in 8 bits, which bitsandbytes cannot compute with under plain "
                "FSDP2; load it in 4 bits, or use DDP, DeepSpeed or Axolotl"
            )
    if engine.kind != "deepspeed":
        return
    config = trainer.accelerator.state.deepspeed_plugin.hf_ds_config
    if engine.stage == 0:
        raise SpftError(
            "zero_optimization.stage is 0 in the DeepSpeed configuration, which divides nothing; "
            "use stage 1, 2 or 3, or plain DDP without DeepSpeed"
        )
    for part in ("offload_optimizer", "offload_param"):
        device = config.get_value(f"zero_optimization.{part}.device", "none")
        if device not in ("none", "cpu", None):
            raise SpftError(
                f"zero_optimization.{part}.device is {device!r} in the DeepSpeed configuration; "
                "SPFT supports none and cpu"
            )
    if config.get_value("tensor_parallel.autotp_size", 0) > 1:
        raise SpftError(
            "tensor_parallel.autotp_size is set in the DeepSpeed configuration; SPFT does not "
            "support tensor parallelism, drop it"
        )


def keeps_client_optimizer(trainer: Trainer) -> bool:
    """Whether the engine steps with the optimizer that the trainer makes.

    With its optimizer offloaded, DeepSpeed wants its own CPU Adam (compiled for minutes at first
    use) in the place of any other, unless `zero_force_ds_cpu_optimizer` is false. The state of
    selected neurons is small enough for torch's kernels, so that is what an unset key is set to.
    """
    if not trainer.is_deepspeed_enabled:
        return True
    config = trainer.accelerator.state.deepspeed_plugin.hf_ds_config
    if config.get_value("zero_optimization.offload_optimizer.device", "none") in ("none", None):
        return True
    # the dictionary itself: DeepSpeed is given it
    return not config.config.setdefault("zero_force_ds_cpu_optimizer", False)


def settle_checkpointing(trainer: Trainer) -> None:
    """Choose the variant of activation checkpointing that works under the engine, with a log line.

    ZeRO-3 frees gathered weights that non-reentrant checkpointing finds changed in its second
    forward (CheckpointError); DDP's search for unused parameters does not go with the reentrant
    variant. Must be called before training.
    """
    args, engine = trainer.args, Engine.of(trainer)
    if not args.gradient_checkpointing:
        return
    kwargs = dict(args.gradient_checkpointing_kwargs or {})
    reentrant = kwargs.get("use_reentrant")
    wanted = None
    if engine.kind == "deepspeed" and engine.stage == 3 and not reentrant:
        wanted = True
    elif engine.kind == "ddp" and reentrant and args.ddp_find_unused_parameters is not False:
        wanted = False
    if wanted is not None:
        logger.warning(
            "gradient checkpointing with use_reentrant: %s does not work under %s; using %s",
            bool(reentrant),
            engine.name,
            str(wanted).lower(),
        )
        args.gradient_checkpointing_kwargs = {**kwargs, "use_reentrant": wanted}
    if (args.gradient_checkpointing_kwargs or {}).get("use_reentrant"):
        # The reentrant variant drops the graph of blocks whose input needs no gradient.
        trainer.model.enable_input_require_grads()


def keep_from_broadcast(model: torch.nn.Module, buffers: Iterable[str]) -> None:
    """Let DDP leave out buffers that all processes have alike; must be called before it wraps.

    It would broadcast them with all others before every forward. What the model's list of names to
    leave out holds already stays there.
    """
    names = {*getattr(model, "_ddp_params_and_buffers_to_ignore", ()), *buffers}
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, names)


def note_trained_parameters(model: torch.nn.Module) -> None:
    """Let FSDP2 look at the parameters now; must be called before any of them is frozen for a time.

    In its first forward it notes the dtype of those that require a gradient, and casts gradients
    to that from then on.
    """
    if hasattr(model, "unshard"):
        model._get_fsdp_state()._lazy_init()


def keep_one_dtype_whole(engine: object) -> None:
    """Let ZeRO-3 divide small parameters that are of another dtype than most that it keeps whole.

    It gathers those after each step into one buffer of the first one's dtype, which fails for fp32
    deltas (or LoRA's factors) of few rows beside a 16-bit base's norms. Must be called before the
    first forward.

    Args:
        engine: the trainer's prepared model.
    """
    whole = getattr(getattr(engine, "optimizer", None), "persistent_parameters", None)
    if not whole:
        return
    dtypes = [parameter.ds_tensor.dtype for parameter in whole]  # what it holds and gathers
    kept = max(set(dtypes), key=lambda dtype: (dtypes.count(dtype), str(dtype)))
    for parameter in whole:
        parameter.ds_persist = parameter.ds_tensor.dtype == kept
    whole[:] = [parameter for parameter in whole if parameter.ds_persist]


def release_gathered_weights(model: torch.nn.Module, engine: object = None) -> None:
    """Let an engine shard again what passes outside of its own schedule have gathered.

    Args:
        engine: the DeepSpeed engine, if one trains.
    """
    for module in model.modules():
        if hasattr(module, "unshard") and hasattr(module, "reshard"):  # FSDP2's FSDPModule
            module.reshard()
    offload = getattr(getattr(engine, "optimizer", None), "parameter_offload", None)
    if offload is not None:  # ZeRO-3
        offload.partition_all_parameters()


def bare_model(trainer):
    """The trainer's model without the wrappers of an engine or of torch.compile."""
    return trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_torch_compile=False)

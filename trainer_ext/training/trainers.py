"""Trainers that train the selected neurons: a mixin for any of them, and transformers' own."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable

from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Trainer

from ..config.spft_config import SpftConfig
from ..errors import SpftError
from ..tuner.marks import trained_parameters
from ..tuner.model import default_task_type
from .callback import SpftCallback
from .methods import TrainerMethods, give_methods


def prepare_trainer(
    trainer: Trainer,
    make_callback: Callable[[Trainer], SpftCallback] = SpftCallback,
    methods: type[TrainerMethods] = TrainerMethods,
) -> SpftCallback:
    """Let a trainer of any class train the selected neurons of its model.

    Its model is a PEFT model with an SPFT adapter. The trainer's saving, resuming and choice of an
    optimizer become SPFT's, and a callback selects the neurons when training begins.

    Args:
        trainer: any `transformers.Trainer`; changed in place. Its class becomes a subclass of what
            it was.
        make_callback: makes the callback.
        methods: what is added to the trainer's own methods.

    Returns:
        the callback, which has the scores after training has begun; of a trainer that has been
        prepared, the one that it has.
    """
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, SpftCallback):
            return callback
    give_methods(trainer, methods)
    callback = make_callback(trainer)
    trainer.add_callback(callback)
    return callback


class SpftTrainerMixin(TrainerMethods):
    """Makes any `transformers.Trainer` subclass, TRL's among them, train by SPFT; put it first.

    One rule: a trainer that takes `peft_config` gets `spft_config` as that and wraps the model
    itself; for any other the bare model is wrapped beforehand. So the reference of DPO and its kin
    is the model with delta off. There never is a second model.

    Args:
        spft_config: train the bare model with this configuration. Leave it out for a model that is
            a PEFT model with an SPFT adapter already: TRL's reference is then a frozen copy of the
            adapter as it is. All other arguments are the trainer's own.

    Raises:
        SpftError: `spft_config` is given together with `peft_config` or with a PEFT model, or a
            `ref_model` is given.
    """

    _task_type: str | None = None  # PEFT's, where the model is given by its name

    def __init__(self, model=None, *args, spft_config: SpftConfig | None = None, **kw):
        if spft_config is not None:
            wraps = _takes_peft_config(type(self))
            _check_spft_config(spft_config, model, wraps, kw)
            if spft_config.task_type is None:
                spft_config = copy.copy(spft_config)
                spft_config.task_type = default_task_type(model) or self._task_type
            if wraps:
                kw["peft_config"] = spft_config
            else:
                model = get_peft_model(model, spft_config)
        trained = trained_parameters(model) if isinstance(model, PeftModel) else []
        values = [parameter.data for parameter in trained]
        super().__init__(model, *args, **kw)
        for parameter, value in zip(trained, values, strict=True):
            if parameter.dtype != value.dtype:  # TRL rounds it, but not its copy, the reference
                parameter.data = value.to(parameter.device)
        if getattr(self, "ref_model", None) is not None:
            raise SpftError(
                f"{type(self).__name__} has a reference model of its own; SPFT's reference is the "
                "model with delta off, so leave ref_model out and pass spft_config, or a PEFT "
                "model with an SPFT adapter"
            )
        prepare_trainer(self)


def _takes_peft_config(kind: type) -> bool:
    inits = (vars(base).get("__init__") for base in kind.__mro__)
    return any("peft_config" in inspect.signature(init).parameters for init in inits if init)


def _check_spft_config(config, model, by_name: bool, arguments: dict) -> None:
    if not isinstance(config, SpftConfig):
        raise SpftError(f"spft_config is a {type(config).__name__}; pass a trainer_ext.SpftConfig")
    if arguments.get("peft_config") is not None:
        raise SpftError(
            "spft_config and peft_config are both given; leave one out: they mean the same here"
        )
    if isinstance(model, PeftModel):
        raise SpftError(
            "spft_config is given but the model is a PEFT model already; pass the base model, or "
            "leave spft_config out"
        )
    if not isinstance(model, (nn.Module, str) if by_name else nn.Module):
        raise SpftError(
            f"spft_config is given with model = {model!r}; pass the loaded model, or let "
            "model_init return peft.get_peft_model(model, SpftConfig(...)) without spft_config"
        )


class SpftTrainer(SpftTrainerMixin, Trainer):
    """`transformers.Trainer` that trains the selected neurons only.

    `SpftTrainer(model, args, train_dataset=..., spft_config=SpftConfig(r=64)).train()`
    """

"""Which of transformers' optimizer names SelectedNeuronAdamW stands in for."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from transformers import TrainingArguments

from ..distributed.engines import engine_of
from ..errors import SpftError
from ..tuner.marks import trained_parameters
from .adamw import SelectedNeuronAdamW

logger = logging.getLogger(__name__)

# What each name asks for. Other names are other optimizers (or paged, or torchao's), left alone.
_BY_NAME: dict[str, dict[str, Any]] = {
    "adamw_torch": {},
    "adamw_torch_fused": {"fused": True},
    "adamw_8bit": {"state_bits": 8},
    "adamw_bnb_8bit": {"state_bits": 8},
}
_FLAGS = {"true": True, "1": True, "false": False, "0": False}
# What `optim_args` may hold, and how its text is read.
_OPTIONS: dict[str, Callable[[str], Any]] = {
    **dict.fromkeys(("beta1", "beta2", "eps"), float),
    **dict.fromkeys(("state_bits", "seed"), int),
    **dict.fromkeys(("foreach", "fused", "stochastic_rounding"), lambda text: _FLAGS[text.lower()]),
}


def selected_neuron_optimizer(args: TrainingArguments) -> tuple[type, dict[str, Any]] | None:
    """SelectedNeuronAdamW and its arguments, if the training arguments name an AdamW of its kinds.

    `optim` is adamw_torch, adamw_torch_fused, adamw_8bit or adamw_bnb_8bit. `optim_args`, text such
    as "beta2=0.95,stochastic_rounding=false", goes before the other fields.

    Returns:
        class and keyword arguments (without weight_decay, which trainers set for each group), or
        None for any other `optim`.

    Raises:
        SpftError: `optim_args` holds something else.
    """
    by_name = _BY_NAME.get(str(getattr(args.optim, "value", args.optim)))
    if by_name is None:
        return None
    options = _read_options(args.optim_args)
    betas = (options.pop("beta1", args.adam_beta1), options.pop("beta2", args.adam_beta2))
    kwargs = {"lr": args.learning_rate, "betas": betas, "eps": args.adam_epsilon}
    if options.get("foreach") and "fused" not in options:
        by_name = {**by_name, "fused": None}
    return SelectedNeuronAdamW, {**kwargs, "seed": args.seed, **by_name, **options}


def _read_options(text: str | None) -> dict[str, Any]:
    options = {}
    for pair in filter(None, (text or "").replace(" ", "").split(",")):
        key, equals, value = pair.partition("=")
        if not equals or key not in _OPTIONS:
            raise SpftError(
                f"optim_args holds {pair!r}; it takes name=value of {', '.join(_OPTIONS)}, "
                "separated by commas (the learning rate and weight decay have fields of their own)"
            )
        try:
            options[key] = _OPTIONS[key](value)
        except (KeyError, ValueError):
            kind = "a number" if _OPTIONS[key] in (int, float) else "true or false"
            raise SpftError(f"optim_args holds {pair!r}; {key} must be {kind}") from None
    return options


class SelectedNeuronOptimizerMixin:
    """Lets a class of trainers train by SelectedNeuronAdamW; put it before the trainer's class.

    It does so where the trainer's arguments name an AdamW of its kinds, with the trainer's own
    parameter groups. A trainer that was given an optimizer, or the class of one, keeps it. Where
    the DeepSpeed configuration asks for DeepSpeed's own optimizer (an `optimizer` block, or
    `zero_force_ds_cpu_optimizer: true`), it is that one.
    """

    def get_optimizer_cls_and_kwargs(self, args: TrainingArguments, model=None) -> tuple[Any, Any]:
        """As the trainer's, which transformers and Axolotl ask for the class."""
        choice = selected_neuron_optimizer(args)
        if choice is None or model is None or not engine_of(self).keeps_client_optimizer(self):
            return super().get_optimizer_cls_and_kwargs(args, model)
        trained = set(map(id, trained_parameters(model)))  # marks them, too
        others = [
            name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and id(parameter) not in trained
        ]
        if others:
            logger.warning(
                "%s is trained but is no parameter of SPFT, so the optimizer is transformers' own",
                others[0],
            )
        if others or not trained:
            return super().get_optimizer_cls_and_kwargs(args, model)
        return choice

"""SpftModel: puts SpftLinear layers into a model and keeps track of their selection."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager

from peft import PeftModel
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ..config.peft_type import SPFT
from ..errors import SpftError
from ..versions import check_versions
from .base_layers import is_linear
from .budgets import settle_budgets
from .delta import NeuronDelta
from .layer import SpftLinear
from .start_rows import prepare_anchors, settle_anchor, take_over_start
from .targets import (
    default_target_modules,
    name_in_base_model,
    refuse_no_target,
    refuse_tied_target,
    targeted_layers,
    warn_of_untrained,
)
from .write_through import begin, end, note_lone_weights, rewrite

logger = logging.getLogger(__name__)


class SpftModel(BaseTuner):
    """PEFT tuner of structured-pruning-based sparse fine-tuning (arXiv 2502.11439).

    Created by `peft.get_peft_model(model, SpftConfig(...))`. A fresh adapter is the identity; its
    neurons are selected later, by `SpftCallback` at the beginning of training or by
    `trainer_ext.select_neurons`.
    """

    prefix = "spft_"
    tuner_layer_cls = SpftLinear
    target_module_mapping: dict[str, list[str]] = {}

    def _prepare_adapter_config(self, peft_config, model_config):
        check_versions()
        take_over_start(peft_config)
        if peft_config.target_modules in (None, "all-linear"):
            peft_config.target_modules = default_target_modules(self.model, peft_config)
        refuse_no_target(self.model, peft_config)
        warn_of_untrained(self.model, peft_config)
        settle_budgets(self.model, peft_config)
        settle_anchor(peft_config, targeted_layers(self.model, peft_config).values())
        return peft_config

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args, **kwargs) -> None:
        """As PEFT's, with a copy of the configuration, in which what is still open is filled in.

        An adapter that is added with the very object that another one has in this model becomes a
        copy of that adapter: TRL makes its reference so, and copies parameters but no buffers.
        """
        given = self.peft_config[adapter_name]
        others = (name for name in self.peft_config if name != adapter_name)
        copied = next((name for name in others if self.peft_config[name] is given), None)
        if given.modules_to_save is None and given.task_type in ("TOKEN_CLS", "QUESTION_ANS"):
            given.modules_to_save = []  # PEFT adds the model's head to this list later
        config = self.peft_config[adapter_name] = copy.copy(given)
        config.copy_of = copied
        is_fresh = config.anchor is None
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        # PEFT condenses long lists into a set, which JSON cannot hold.
        if isinstance(config.target_modules, set):
            config.target_modules = sorted(config.target_modules)
        # refuses a pattern that matched no linear layer
        layers = spft_layers(model, adapter_name)
        note_lone_weights(model, layers.values())
        if is_fresh:
            prepare_anchors(model, config, layers, adapter_name)
        if copied is not None and is_selected(model, adapter_name):
            logger.warning(
                "adapter %r has the configuration of %r and starts with its neurons; give it one "
                "of its own to select anew",
                adapter_name,
                copied,
            )

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        for config in self.peft_config.values():
            if config.copy_of == adapter_name:
                config.copy_of = None

    def _unload_and_optionally_merge(self, *args, **kwargs) -> nn.Module:
        restore_base(self.model)
        return super()._unload_and_optionally_merge(*args, **kwargs)

    def _create_and_replace(
        self,
        peft_config,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        name = name_in_base_model(current_key)
        if isinstance(target, SpftLinear):
            target.update_layer(adapter_name, peft_config, name)
            return
        by_pattern = isinstance(peft_config.target_modules, str)
        if by_pattern and not is_linear(target):
            return  # a pattern such as .*mlp.* matches containers and activations too
        refuse_tied_target(self.model, current_key, target)
        layer = SpftLinear(target, adapter_name, peft_config, name)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)


def default_task_type(model: nn.Module) -> str | None:
    """PEFT's task type for a transformers model, by its class name; None if it has none.

    It lets the AutoPeftModel classes find the adapter's base class.
    """
    for suffix, task_type in (
        ("ForCausalLM", "CAUSAL_LM"),
        ("ForConditionalGeneration", "CAUSAL_LM"),
        ("ForSequenceClassification", "SEQ_CLS"),
        ("ForTokenClassification", "TOKEN_CLS"),
    ):
        if type(model).__name__.endswith(suffix):
            return task_type
    return None


def spft_layers(model: nn.Module, adapter_name: str = "default") -> dict[str, SpftLinear]:
    """The model's SPFT layers that carry the adapter, by their names in the base model.

    Wrappers (PEFT, DDP, torch.compile) may surround the model; their prefixes are left out.

    Raises:
        SpftError: no layer carries the adapter.
    """
    layers = {
        name_in_base_model(name): module
        for name, module in model.named_modules()
        if isinstance(module, SpftLinear) and adapter_name in module.spft_delta
    }
    if not layers:
        raise SpftError(
            f"the model has no linear layer with an SPFT adapter named {adapter_name!r}; wrap it "
            "with peft.get_peft_model(model, SpftConfig(...)), and check `target_modules`"
        )
    return layers


def layer_sizes(model: nn.Module, adapter_name: str = "default") -> dict[str, int]:
    """Numbers of neurons of the adapter's layers, by the layers' names in the base model."""
    return {name: layer.out_features for name, layer in spft_layers(model, adapter_name).items()}


def adapter_config(model: nn.Module, adapter_name: str = "default"):
    """The SpftConfig of an adapter.

    Raises:
        SpftError: the model has no SPFT adapter of that name.
    """
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if getattr(config, "peft_type", None) != SPFT:
        raise SpftError(
            f"{type(model).__name__} has no SPFT adapter named {adapter_name!r}; wrap it with "
            "peft.get_peft_model(model, SpftConfig(...))"
        )
    return config


def active_spft_adapter(model) -> str:
    """Name of the SPFT adapter that is active in a PEFT model.

    Raises:
        SpftError: there is none, or more than one.
    """
    active = (
        [name for name in model.active_adapters if model.peft_config[name].peft_type == SPFT]
        if isinstance(model, PeftModel)
        else []
    )
    if len(active) != 1:
        raise SpftError(
            f"{type(model).__name__} has {len(active)} active SPFT adapters; training needs "
            "exactly one: pass spft_config to SpftTrainer, or wrap the model with "
            "peft.get_peft_model(model, SpftConfig(...))"
        )
    return active[0]


def deltas(model: nn.Module, adapter_name: str = "default") -> dict[str, NeuronDelta]:
    """The compact updates of an adapter, by the names of their layers in the base model."""
    return {
        name: layer.spft_delta[adapter_name]
        for name, layer in spft_layers(model, adapter_name).items()
    }


def write_through(model: nn.Module, adapter_name: str = "default") -> int:
    """Let the base weights hold W0 + delta of an adapter, in its selected rows, from now on.

    Training forwards see to this by themselves once a torch optimizer has stepped the deltas. The
    rows then follow every step of one, every loaded state dict and, outside of compiled forwards,
    every change that tensor versions show. Call it where that does not suffice: before
    `torch.compile`; after a step of a DeepSpeed engine in a loop of your own; after writes through
    `.data`; and after other changes of deltas than steps in front of a compiled forward.

    Returns:
        number of layers whose weights are written: with `forward: auto`, those that are whole.

    Raises:
        SpftError: no layer carries the adapter, or `forward` is "write_through" and a weight is
            sharded, offloaded, the model's head, shared with another module or replaced.
    """
    layers = spft_layers(model, adapter_name).values()
    written = [layer for layer in layers if begin(layer, adapter_name)]
    rewrite(written)
    return len(written)


@contextmanager
def writing_through(model: nn.Module, adapter_name: str = "default") -> Iterator[int]:
    """`write_through` while inside, W0 again after it, whatever happens; for loops of your own."""
    try:
        yield write_through(model, adapter_name)
    finally:
        restore_base(model)


def restore_base(model: nn.Module) -> None:
    """Put W0 back, bit for bit, wherever base weights hold an adapter's update.

    The model computes the same afterwards, by the delta path, until it is trained again.
    """
    for module in model.modules():
        if isinstance(module, SpftLinear):
            end(module)


def selection_buffers(model: nn.Module) -> list[str]:
    """Names of the buffers that say which neurons are selected and start where, of all adapters."""
    return [
        f"{name}.{buffer}"
        for name, module in model.named_modules()
        if isinstance(module, NeuronDelta)
        for buffer in module.saved_buffers
    ]


def is_selected(model: nn.Module, adapter_name: str = "default") -> bool:
    """Whether the adapter's neurons have been selected.

    Raises:
        SpftError: they are selected in some layers only, as after loading a damaged adapter.
    """
    by_state: dict[bool, list[str]] = {True: [], False: []}
    for name, delta in deltas(model, adapter_name).items():
        by_state[delta.is_selected].append(name)
    if by_state[True] and by_state[False]:
        raise SpftError(
            f"adapter {adapter_name!r} has selected neurons in {len(by_state[True])} layers but "
            f"none in {len(by_state[False])}, first {by_state[False][0]}; its file is incomplete, "
            "load another checkpoint"
        )
    return bool(by_state[True])

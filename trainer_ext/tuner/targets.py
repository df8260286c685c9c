"""Which modules an SPFT adapter is put on when the user names none, and which it must not touch."""

from __future__ import annotations

import copy
import logging
import re

from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from ..errors import SpftError
from .base_layers import is_linear, linear_shape
from .layer import SpftLinear

logger = logging.getLogger(__name__)

# Name parts of modules that are linear but not layers of the language model: routers choose
# experts; towers for other media and what connects them feed it. Mamba's fused kernels read the
# weight of out_proj themselves. The last two are PEFT's copies of modules_to_save.
NOT_LANGUAGE_MODEL = re.compile(
    r"(^|\.)(router|gate|shared_expert_gate|vision\w*|visual|audio\w*|multi_modal_projector"
    r"|mm_projector|connector|aligner|qformer|language_projection|image_to_text_projection"
    r"|generation_\w+|(mamba|mixer)\.out_proj|original_module|modules_to_save)(\.|$)"
)

# What PEFT, torch.compile, DDP and activation checkpointing put before or into module names.
_WRAPPER_NAMES = re.compile(
    r"^(base_model\.model\.|module\.)+|_orig_mod\.|_checkpoint_wrapped_module\."
)


def name_in_base_model(name: str) -> str:
    """A module's name without what wrappers (PEFT, DDP, torch.compile) put into it."""
    return _WRAPPER_NAMES.sub("", name)


def default_target_modules(model: nn.Module, config=None) -> list[str]:
    """Names of every linear layer of the language model but the head.

    Args:
        config: an SpftConfig whose `layers_to_transform` restricts the choice, if it has one.

    Raises:
        SpftError: the model has no such layer.
    """
    heads = [m for m in (_output_embeddings(model), *_classification_heads(model)) if m is not None]
    names = [
        name
        for name, module in model.named_modules()
        if (is_linear(module) or isinstance(module, SpftLinear))
        and not any(module is head for head in heads)
        and not NOT_LANGUAGE_MODEL.search(name)
        and ".base_layer" not in name
    ]
    if not names:
        raise SpftError(
            f"{type(model).__name__} has no linear layer that SPFT trains by default; "
            "name the layers in `target_modules`"
        )
    return names if config is None else _in_chosen_blocks(names, config)


def refuse_no_target(model: nn.Module, config) -> None:
    """Refuse target_modules that match nothing, which PEFT answers with a bare ValueError.

    Raises:
        SpftError: names what was given and layers that there are.
    """
    if any(check_target_module_exists(config, name) for name, _ in model.named_modules()):
        return
    given = []
    for key in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
        value = getattr(config, key)
        if value:
            given.append(f"`{key}` is {_shortened(value)}")
    endings = sorted({name.rpartition(".")[2] for name in default_target_modules(model)})
    raise SpftError(
        f"{' and '.join(given)}, which leaves no module of {type(model).__name__}; "
        f"name some of its linear layers: {', '.join(endings)}"
    )


def targeted_shapes(model: nn.Module, config) -> dict[str, tuple[int, int]]:
    """(d_in, d_out) of the linear layers that the configuration targets, in the model's order.

    Args:
        model: before or after the adapter's layers were put in.
        config: an SpftConfig whose `target_modules` are not None.

    Raises:
        SpftError: a targeted layer is quantised by something else than bitsandbytes.
    """
    return {
        name: linear_shape(layer, name) for name, layer in targeted_layers(model, config).items()
    }


def targeted_layers(model: nn.Module, config) -> dict[str, nn.Module]:
    """The linear layers that the configuration targets, without SPFT layers around them.

    Args:
        config: an SpftConfig whose `target_modules` are not None.
    """
    layers = {}
    inside: tuple[str, ...] = ()  # names in layers of another adapter, which are no targets
    for name, module in model.named_modules():
        if inside and name.startswith(inside):
            continue
        if isinstance(module, BaseTunerLayer):
            inside = (*inside, f"{name}.")
        layer = module.get_base_layer() if isinstance(module, SpftLinear) else module
        if is_linear(layer) and check_target_module_exists(config, name):
            layers[name_in_base_model(name)] = layer
    return layers


def warn_of_untrained(model: nn.Module, config) -> None:
    """Warn about what a user would take for trained: names without a module, fused experts."""
    modules = [name for name, _ in model.named_modules()]
    if isinstance(config.target_modules, (list, set)):
        unmatched = [
            target
            for target in sorted(config.target_modules)
            if not any(name == target or name.endswith(f".{target}") for name in modules)
        ]
        if unmatched:
            logger.warning(
                "target_modules names %s, but %s has no such module",
                ", ".join(unmatched),
                type(model).__name__,
            )
    experts = [
        name for name, p in model.named_parameters() if p.ndim == 3 and ".experts." in f".{name}"
    ]
    if experts:
        logger.warning(
            "%d fused expert weights, first %s, are not trained: SPFT trains nn.Linear and Conv1D "
            "layers only",
            len(experts),
            experts[0],
        )


def _shortened(value) -> str:
    if isinstance(value, list) and len(value) > 8:
        return f"a list of {len(value)}"
    return repr(value)


def _in_chosen_blocks(names: list[str], config) -> list[str]:
    """The names that `layers_to_transform` leaves: PEFT heeds it for endings of names only."""
    if config.layers_to_transform is None:
        return names
    by_ending = copy.copy(config)
    by_ending.target_modules = sorted({name.rpartition(".")[2] for name in names})
    return [name for name in names if check_target_module_exists(by_ending, name)]


def refuse_tied_target(model: nn.Module, name: str, module: nn.Module) -> None:
    """Refuse a target that shares its weight with the input embeddings.

    Raises:
        SpftError: training a row of the head would change the embedding of that token too.
    """
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    weight = getattr(module, "weight", None)
    if embeddings is None or weight is None or module is embeddings:
        return
    if weight is getattr(embeddings, "weight", None):
        raise SpftError(
            f"`target_modules` matches {name}, whose weight is tied to the input embeddings: its "
            "rows are tokens, and training one would move both; leave it out of `target_modules`, "
            "or load the model with tie_word_embeddings=False"
        )


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    if not hasattr(model, "get_output_embeddings"):
        return None
    return model.get_output_embeddings()


def _classification_heads(model: nn.Module) -> list[nn.Module]:
    # transformers' names for the heads of sequence and token classification models
    return [getattr(model, name) for name in ("score", "classifier") if hasattr(model, name)]

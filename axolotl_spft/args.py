"""The YAML keys of the plugin, and the SpftConfig that a YAML asks for.

Every key is a field of SpftConfig: its type, default and help stand there alone.
"""

from __future__ import annotations

import difflib
import logging
import types
from contextlib import contextmanager
from typing import Any, Union, get_args, get_origin, get_type_hints

from pydantic import (
    BaseModel,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
    create_model,
)

from trainer_ext import SpftConfig, SpftError
from trainer_ext.config.spft_config import default_in_words, own_options
from trainer_ext.errors import in_plain_words
from trainer_ext.tuner.targets import default_target_modules

logger = logging.getLogger(__name__)

# Fields that Axolotl has keys of its own for.
_AXOLOTLS = {
    "layers_to_transform": "peft_layers_to_transform",
    "layers_pattern": "peft_layers_pattern",
    "modules_to_save": "lora_modules_to_save",
    "start_adapter": "lora_model_dir",
}
_FILLED_IN = ("allocated", "anchor")
# The fields that are keys.
OPTIONS = [o for o in own_options() if o.name not in (*_AXOLOTLS, *_FILLED_IN)]
# Fields of SpftConfig -> what the YAML calls them.
YAML_NAMES = {option.name: f"spft_{option.name}" for option in OPTIONS}
# LoRA keys that keep a meaning under SPFT; the others get one warning.
_USED_LORA_KEYS = {
    "lora_model_dir",
    "lora_modules_to_save",
    "lora_r",
    "lora_target_linear",
    "lora_target_modules",
}
_STRICT = {int: StrictInt, float: StrictFloat | StrictInt, str: StrictStr, bool: StrictBool}


def _strict(kind: Any) -> Any:
    """A field's type without pydantic's conversions, such as of "8" to 8."""
    if get_origin(kind) in (Union, types.UnionType):
        return Union[tuple(map(_strict, get_args(kind)))]  # noqa: UP007 (of a tuple)
    if get_origin(kind):
        return get_origin(kind)[tuple(map(_strict, get_args(kind)))]
    return _STRICT.get(kind, kind)


def default_of(option) -> str:
    """The default of a key in words."""
    if option.name == "r":
        return f"2 x lora_r if given, else {default_in_words(option)}"
    return default_in_words(option)


def description_of(option) -> str:
    """The help of a field, in the YAML's words."""
    return in_plain_words(option.metadata["help"], YAML_NAMES)


def _field(option) -> Any:
    default = default_of(option)
    text = f"{description_of(option)}. Default: {default}." if default else description_of(option)
    return Field(default=None, description=text)


_types = get_type_hints(SpftConfig)
# Types are strict field by field: a strict model would spread to Axolotl's own keys, since Axolotl
# merges this class into its configuration class.
SPFTArgs = create_model(
    "SPFTArgs",
    __base__=BaseModel,
    __module__=__name__,
    __doc__="Keys that `axolotl_spft.SPFTPlugin` adds to Axolotl's configuration.",
    **{
        YAML_NAMES[option.name]: (_strict(_types[option.name]) | None, _field(option))
        for option in OPTIONS
    },
)


def read_args(cfg: dict) -> BaseModel:
    """The plugin's keys of a raw YAML, checked.

    Raises:
        SpftError: an unknown key (the nearest one is named), a wrong type or a value that is not
            allowed.
    """
    given = {key: value for key, value in cfg.items() if key.startswith("spft_")}
    for key in given:
        if key not in SPFTArgs.model_fields:
            nearest = difflib.get_close_matches(key, SPFTArgs.model_fields, n=1, cutoff=0.0)[0]
            raise SpftError(
                f"{key} is not a key of axolotl-spft; did you mean {nearest}? "
                f"Known keys: {', '.join(SPFTArgs.model_fields)}"
            )
    try:
        args = SPFTArgs.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise SpftError(
            f"{first['loc'][0]} is {first['input']!r}; {first['msg'][0].lower()}{first['msg'][1:]}"
        ) from None
    values = args.model_dump(exclude_none=True)
    try:
        SpftConfig(**{key.removeprefix("spft_"): value for key, value in values.items()})
    except SpftError as error:
        raise error.renamed(YAML_NAMES) from None
    if args.spft_target_modules in ([], ""):
        raise SpftError(
            f"spft_target_modules is {args.spft_target_modules!r}; name layers, or drop the key to "
            "train every linear layer but the head"
        )
    return args


def warn_of_unused_lora_keys(cfg: dict) -> None:
    """One warning for all LoRA keys that SPFT has no use for."""
    unused = sorted(
        key
        for key, value in cfg.items()
        if key.startswith("lora_") and key not in _USED_LORA_KEYS and value not in (None, False)
    )
    if unused:
        logger.warning("adapter: prune_spft does not use %s", ", ".join(unused))


def spft_config(cfg, model) -> SpftConfig:
    """The SpftConfig that a validated configuration asks for.

    `spft_` keys speak first; where there is none, the LoRA keys of a converted YAML do.

    Raises:
        SpftError: see `SpftConfig`.
    """
    given = _given(cfg, [*YAML_NAMES, *(name for name in _AXOLOTLS if name != "start_adapter")])
    if not given.keys() & {"r", "density"} and cfg.lora_r:
        given["r"] = 2 * cfg.lora_r
    by_lora = "target_modules" not in given and cfg.lora_target_modules
    if by_lora:
        given["target_modules"] = _plain(cfg.lora_target_modules)
    config = SpftConfig(**given)
    if by_lora and cfg.lora_target_linear:
        named = [by_lora] if isinstance(by_lora, str) else list(by_lora)
        config.target_modules = default_target_modules(model, config) + named
    return config


def start_config(cfg) -> SpftConfig:
    """The SpftConfig of a run whose reference is the model with the adapter in `lora_model_dir`.

    That adapter brings its own neurons and their number.
    """
    return SpftConfig(**_given(cfg, ["start_adapter", "forward", "quant_init"]))


def _given(cfg, names) -> dict[str, Any]:
    """The named fields that a configuration sets; an empty list or text sets nothing."""
    keys = YAML_NAMES | _AXOLOTLS
    values = {name: cfg[keys[name]] for name in names}
    return {name: _plain(value) for name, value in values.items() if value not in (None, "", [])}


def yaml_names(cfg) -> dict[str, str]:
    """Fields of SpftConfig -> the YAML's keys that set them."""
    names = YAML_NAMES | _AXOLOTLS
    if cfg.lora_target_modules and not cfg.spft_target_modules:
        names["target_modules"] = "lora_target_modules"
    if cfg.lora_r and cfg.spft_r is None and cfg.spft_density is None:
        names["r"] = "spft_r (2 x lora_r)"
    return names


@contextmanager
def in_yaml_words(cfg):
    """Let messages of trainer_ext, which name fields of SpftConfig, name the YAML's keys."""
    try:
        yield
    except SpftError as error:
        raise error.renamed(yaml_names(cfg)) from None


def _plain(value):
    """A list of Axolotl's own kind as a plain one."""
    return list(value) if isinstance(value, list) else value

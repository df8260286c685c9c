"""The YAML keys of the plugin, and the SpftConfig that a YAML asks for."""

from __future__ import annotations

import difflib
import logging
from contextlib import contextmanager

from pydantic import BaseModel, Field, StrictFloat, StrictInt, StrictStr, ValidationError

from trainer_ext import SpftConfig, SpftError
from trainer_ext.config import AXES, METRICS, check_budget, check_choice, check_positive_int
from trainer_ext.tuner.targets import default_target_modules

logger = logging.getLogger(__name__)

# LoRA keys that keep a meaning under SPFT; the others get one warning.
_USED_LORA_KEYS = {
    "lora_model_dir",
    "lora_modules_to_save",
    "lora_r",
    "lora_target_linear",
    "lora_target_modules",
}


class SPFTArgs(BaseModel):
    """Keys that `axolotl_spft.SPFTPlugin` adds to Axolotl's configuration.

    Types are strict field by field: a strict model configuration would spread to Axolotl's own
    keys, since Axolotl merges this class into its configuration class.
    """

    spft_r: StrictInt | None = Field(
        default=None,
        description="Neurons to train in each layer. Default: 2 x lora_r if the YAML has one "
        "(about equally many trainable parameters), else 64.",
    )
    spft_density: StrictFloat | StrictInt | None = Field(
        default=None,
        description="Share of each layer's neurons to train, in (0, 1], instead of spft_r.",
    )
    spft_importance: StrictStr | None = Field(
        default=None,
        description=f"Importance metric: {', '.join(METRICS)}. Default: group_taylor.",
    )
    spft_calibration_batches: StrictInt | None = Field(
        default=None,
        description="Optimizer steps' worth of data that the metric is averaged over. Default: 8.",
    )
    spft_importance_file: StrictStr | None = Field(
        default=None,
        description="Scores of an earlier run (spft_importance.safetensors) to select by.",
    )
    spft_axis: StrictStr | None = Field(
        default=None, description="What a neuron is: rows (output neurons). Default: rows."
    )
    spft_target_modules: list[StrictStr] | StrictStr | None = Field(
        default=None,
        description="Layers to train: names or a regular expression. Default: every linear layer "
        "of the language model but the head.",
    )
    spft_exclude_modules: list[StrictStr] | StrictStr | None = Field(
        default=None, description="Layers to leave out: names or a regular expression."
    )
    spft_seed: StrictInt | None = Field(
        default=None, description="Seed of the random importance. Default: 42."
    )


def read_args(cfg: dict) -> SPFTArgs:
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
    check_budget(args.spft_r, args.spft_density, prefix="spft_")
    if args.spft_importance is not None:
        check_choice("spft_importance", args.spft_importance, METRICS)
    if args.spft_axis is not None:
        check_choice("spft_axis", args.spft_axis, AXES)
    if args.spft_calibration_batches is not None:
        check_positive_int("spft_calibration_batches", args.spft_calibration_batches)
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
    r = cfg.spft_r
    if r is None and cfg.spft_density is None and cfg.lora_r:
        r = 2 * cfg.lora_r
    given = {
        "importance": cfg.spft_importance,
        "calibration_batches": cfg.spft_calibration_batches,
        "importance_file": cfg.spft_importance_file,
        "axis": cfg.spft_axis,
        "seed": cfg.spft_seed,
    }
    named = cfg.spft_target_modules or cfg.lora_target_modules or None
    config = SpftConfig(
        r=r,
        density=cfg.spft_density,
        target_modules=_plain(named) if named else None,
        exclude_modules=cfg.spft_exclude_modules or None,
        modules_to_save=list(cfg.lora_modules_to_save) if cfg.lora_modules_to_save else None,
        layers_to_transform=cfg.peft_layers_to_transform or None,
        layers_pattern=cfg.peft_layers_pattern or None,
        **{name: value for name, value in given.items() if value is not None},
    )
    if cfg.lora_target_linear and named and not cfg.spft_target_modules:
        named = [named] if isinstance(named, str) else list(named)
        config.target_modules = default_target_modules(model, config) + named
    return config


@contextmanager
def in_yaml_words(cfg):
    """Let messages of trainer_ext, which name fields of SpftConfig, name the YAML's keys."""
    try:
        yield
    except SpftError as error:
        names = {name.removeprefix("spft_"): name for name in SPFTArgs.model_fields}
        names |= {"layers_to_transform": "peft_layers_to_transform"}
        names |= {"layers_pattern": "peft_layers_pattern"}
        if cfg.lora_target_modules and not cfg.spft_target_modules:
            names["target_modules"] = "lora_target_modules"
        if cfg.lora_r and cfg.spft_r is None and cfg.spft_density is None:
            names["r"] = "spft_r (2 x lora_r)"
        raise error.renamed(names) from None


def _plain(value) -> list[str] | str:
    return value if isinstance(value, str) else list(value)

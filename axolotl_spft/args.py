"""The YAML keys of the plugin, and the SpftConfig that a YAML asks for."""

from __future__ import annotations

import difflib
import logging
from contextlib import contextmanager

from pydantic import (
    BaseModel,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    StrictStr,
    ValidationError,
)

from trainer_ext import SpftConfig, SpftError
from trainer_ext.config.spft_config import METRICS
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


# Keys whose value is the SpftConfig field of the same name, as it stands.
_PASSED_ON = (
    "importance",
    "calibration_batches",
    "importance_file",
    "class_field",
    "zo_eps",
    "zo_directions",
    "accumulator_memory",
    "accumulator_offload",
    "stability",
    "allocation",
    "allocation_floor",
    "allocation_ceiling",
    "r_pattern",
    "density_pattern",
    "axis",
    "forward",
    "quant_init",
    "seed",
)


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
    spft_class_field: StrictStr | None = Field(
        default=None, description="Dataset column that holds the classes of quantile_mean."
    )
    spft_zo_eps: StrictFloat | StrictInt | None = Field(
        default=None, description="Size of zo_taylor's perturbations. Default: 0.001."
    )
    spft_zo_directions: StrictInt | None = Field(
        default=None, description="Random directions of zo_taylor for each batch. Default: 5."
    )
    spft_accumulator_memory: StrictFloat | StrictInt | None = Field(
        default=None,
        description="Memory for taylor's accumulators on each process, in GiB; what does not fit "
        "takes further passes. Default: no limit, one pass.",
    )
    spft_accumulator_offload: StrictBool | None = Field(
        default=None, description="Keep taylor's accumulators in CPU memory. Default: false."
    )
    spft_stability: StrictBool | None = Field(
        default=None,
        description="Report how far two halves of the calibration data agree. Default: true.",
    )
    spft_allocation: StrictStr | None = Field(
        default=None,
        description="uniform, or global: one budget of parameters spread over the layers by the "
        "scores in spft_importance_file. Default: uniform.",
    )
    spft_allocation_floor: StrictFloat | StrictInt | None = Field(
        default=None,
        description="Least share of its uniform number that global leaves a layer. Default: 0.25.",
    )
    spft_allocation_ceiling: StrictFloat | StrictInt | None = Field(
        default=None,
        description="Largest multiple of its uniform number that global gives. Default: 4.",
    )
    spft_r_pattern: dict[StrictStr, StrictInt] | None = Field(
        default=None, description="Neurons of single layers: name or pattern -> number."
    )
    spft_density_pattern: dict[StrictStr, StrictFloat | StrictInt] | None = Field(
        default=None, description="As spft_r_pattern, with shares of the layer's neurons."
    )
    spft_axis: StrictStr | None = Field(
        default=None, description="What a neuron is: rows (output neurons). Default: rows."
    )
    spft_forward: StrictStr | None = Field(
        default=None,
        description="auto, delta (adds the update's outputs), or write_through (the base weight's "
        "selected rows hold the update; needs whole weights). Default: auto.",
    )
    spft_quant_init: StrictStr | None = Field(
        default=None,
        description="How the trained neurons of a 4- or 8-bit base start: exact (from the original "
        "rows in the checkpoint) or none (from the quantised ones). Default: exact.",
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
        default=None, description="Seed of random scores and of zo_taylor's noise. Default: 42."
    )


# Fields of SpftConfig -> what the YAML calls them.
_YAML_NAMES = {key.removeprefix("spft_"): key for key in SPFTArgs.model_fields}


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
    values = args.model_dump(exclude_none=True)
    try:
        SpftConfig(**{key.removeprefix("spft_"): value for key, value in values.items()})
    except SpftError as error:
        raise error.renamed(_YAML_NAMES) from None
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
    given = {name: cfg[f"spft_{name}"] for name in _PASSED_ON}
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


def start_config(cfg) -> SpftConfig:
    """The SpftConfig of a run whose reference is the model with the adapter in `lora_model_dir`.

    That adapter brings its own neurons and their number.
    """
    given = {name: cfg[f"spft_{name}"] for name in ("forward", "quant_init")}
    given = {name: value for name, value in given.items() if value is not None}
    return SpftConfig(start_adapter=cfg.lora_model_dir, **given)


def yaml_names(cfg) -> dict[str, str]:
    """Fields of SpftConfig -> the YAML's keys that set them."""
    names = _YAML_NAMES | {"layers_to_transform": "peft_layers_to_transform"}
    names |= {"layers_pattern": "peft_layers_pattern", "start_adapter": "lora_model_dir"}
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


def _plain(value) -> list[str] | str:
    return value if isinstance(value, str) else list(value)

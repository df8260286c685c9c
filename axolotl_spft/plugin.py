"""SPFTPlugin: hooks `adapter: prune_spft` into Axolotl."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import torch
from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from peft import PeftConfig, PeftModel, get_peft_model

from trainer_ext import SpftCallback, SpftConfig, SpftError
from trainer_ext.peft_type import add_peft_type
from trainer_ext.tuner.model import default_task_type

from .args import read_args, spft_config, warn_of_unused_lora_keys
from .checks import refuse_unsupported

logger = logging.getLogger(__name__)

ADAPTER = "prune_spft"


class SPFTPlugin(BasePlugin):
    """Trains the neurons that matter: see the README's table of `spft_` keys."""

    def register(self, cfg: dict) -> None:
        """Check the raw YAML, before Axolotl drops the keys that it does not know."""
        _show_mistakes_in_one_line()
        args = read_args(cfg)
        if cfg.get("adapter") != ADAPTER:
            used = sorted(args.model_fields_set)
            if used:
                raise SpftError(
                    f"{used[0]} has no effect with adapter: {cfg.get('adapter')}; "
                    f"set adapter: {ADAPTER}, or drop the key"
                )
            return
        refuse_unsupported(cfg)
        warn_of_unused_lora_keys(cfg)
        # Axolotl's default merge reads LoRA files only.
        cfg["merge_method"] = "legacy"

    def get_input_args(self) -> str:
        return "axolotl_spft.args.SPFTArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=ADAPTER)]

    def load_adapter(self, model, cfg, inference: bool = False, config_only: bool = False):
        """Wrap the model with a fresh adapter, or with the one in `lora_model_dir`."""
        if cfg.adapter != ADAPTER:
            return None
        options = {}
        if cfg.peft_autocast_adapter_dtype is not None:
            options["autocast_adapter_dtype"] = cfg.peft_autocast_adapter_dtype
        if cfg.lora_model_dir:
            check_saved_adapter(cfg)
            model = PeftModel.from_pretrained(
                model, cfg.lora_model_dir, is_trainable=not inference, **options
            )
            config = model.peft_config["default"]
        else:
            config = spft_config(cfg, model)
            config.task_type = default_task_type(model)
            if config_only:
                return None, config
            model = get_peft_model(model, config, **options)
        model.print_trainable_parameters()
        return model, config

    def get_training_args(self, cfg) -> dict | None:
        """Allow bf16 on machines without an accelerator, which the Trainer wants to be told of."""
        if cfg.adapter != ADAPTER or not (cfg.bf16 or cfg.bfloat16):
            return None
        return None if torch.accelerator.is_available() else {"use_cpu": True}

    def post_trainer_create(self, cfg, trainer) -> None:
        if cfg.adapter == ADAPTER:
            trainer.add_callback(SpftCallback(trainer))


def check_saved_adapter(cfg) -> SpftConfig:
    """Configuration of the adapter in `lora_model_dir`, which governs.

    Raises:
        SpftError: the folder holds no SPFT adapter, or one whose budget the YAML contradicts.
    """
    folder = cfg.lora_model_dir
    if Path(folder).is_dir() and not (Path(folder) / "adapter_config.json").is_file():
        raise SpftError(
            f"lora_model_dir is {folder!r}, which holds no adapter_config.json; "
            "give the folder that a training run wrote (its output_dir or a checkpoint)"
        )
    saved = PeftConfig.from_pretrained(folder)
    if saved.peft_type != add_peft_type("SPFT"):
        raise SpftError(
            f"lora_model_dir is {folder!r}, which holds a {saved.peft_type.value} adapter; "
            f"adapter: {ADAPTER} continues SPFT adapters only"
        )
    for key, wanted, has in (
        ("spft_r", cfg.spft_r, saved.r),
        ("spft_density", cfg.spft_density, saved.density),
    ):
        if wanted is not None and wanted != has:
            raise SpftError(
                f"{key} is {wanted} but the adapter in {folder!r} was made with r = {saved.r}, "
                f"density = {saved.density}; drop {key}, or start a fresh adapter without "
                "lora_model_dir"
            )
    return saved


def _show_mistakes_in_one_line() -> None:
    """Print a user's mistake without a traceback when it ends the program."""
    if getattr(sys.excepthook, "shows_spft_errors", False):
        return
    others = sys.excepthook

    def hook(kind, error, traceback):
        if issubclass(kind, SpftError):
            print(f"axolotl-spft: {error}", file=sys.stderr)
        else:
            others(kind, error, traceback)

    hook.shows_spft_errors = True
    sys.excepthook = hook

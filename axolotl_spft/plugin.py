"""SPFTPlugin: hooks `adapter: prune_spft` into Axolotl."""

from __future__ import annotations

import logging
import sys
from functools import partial

import torch
from axolotl.integrations.base import AdapterCapabilities, BasePlugin
from axolotl.utils.dict import DictDefault
from peft import PeftModel, get_peft_model

from trainer_ext import SpftCallback, SpftError, prepare_trainer
from trainer_ext.errors import in_plain_words, show_mistake
from trainer_ext.training.methods import TrainerMethods
from trainer_ext.tuner.model import default_task_type
from trainer_ext.versions import check_versions

from . import quantised
from .args import (
    in_yaml_words,
    read_args,
    spft_config,
    start_config,
    warn_of_unused_lora_keys,
    yaml_names,
)
from .checks import check_classes, refuse_unsupported
from .class_column import calibrates_by_class, load_with_class_column
from .preferences import WITH_REFERENCE, load_preferences, save_adapter_alone, starts_from_sft
from .saved import check_continued_adapter, check_resumed_adapter, settle_merging, settle_resuming

ADAPTER = "prune_spft"
NAME = "axolotl_spft.SPFTPlugin"  # in `plugins`, and in Axolotl's list of what is installed


class YamlCallback(SpftCallback):
    """SpftCallback whose messages name the YAML's keys."""

    logger = logging.getLogger("axolotl.spft")  # Axolotl shows INFO of its own loggers alone

    def __init__(self, trainer, cfg) -> None:
        super().__init__(trainer)
        self._cfg = cfg

    @classmethod
    def attach(cls, trainer, cfg) -> None:
        """Let it take part in the training."""
        prepare_trainer(trainer, partial(cls, cfg=cfg), _methods(cfg))

    def words(self, message: str) -> str:
        return in_plain_words(message, yaml_names(self._cfg))


def _methods(cfg) -> type[TrainerMethods]:
    """What SPFT adds to a trainer's methods, where mistakes name the YAML's keys."""

    class YamlTrainerMethods(TrainerMethods):
        def train(self, *args, **kwargs):
            with in_yaml_words(cfg):
                return super().train(*args, **kwargs)

    return YamlTrainerMethods


class SPFTPlugin(BasePlugin):
    """Trains the neurons that matter: see the README's table of `spft_` keys.

    Attributes:
        callback_class: carries the run; `spft calibrate` puts its own here.
    """

    callback_class = YamlCallback

    def register(self, cfg: dict) -> None:
        """Check the raw YAML, before Axolotl drops the keys that it does not know."""
        _show_mistakes_in_one_line(cfg)
        named = named_plugins(cfg)
        _refuse_other_names(named)
        args = read_args(cfg)
        if cfg.get("adapter") != ADAPTER:
            used = sorted(args.model_fields_set)
            if used:
                raise SpftError(
                    f"{used[0]} has no effect with adapter: {cfg.get('adapter')}; "
                    f"set adapter: {ADAPTER}, or drop the key"
                )
            if NAME in named:
                _refuse_ignored_adapter(cfg)
            return
        check_versions("axolotl")
        refuse_unsupported(cfg)
        check_classes(cfg)
        warn_of_unused_lora_keys(cfg)
        if quantised.is_quantised(cfg):
            quantised.leave_room(cfg)
        # Axolotl's default merge reads LoRA files only.
        cfg["merge_method"] = "legacy"

    def get_input_args(self) -> str:
        return "axolotl_spft.args.SPFTArgs"

    def get_adapter_capabilities(self) -> list[AdapterCapabilities]:
        return [AdapterCapabilities(name=ADAPTER)]

    def load_datasets(self, cfg, preprocess: bool = False):
        """Axolotl's own datasets, which keep the class column where quantile_mean needs it."""
        if cfg.adapter != ADAPTER:
            return None
        if cfg.rl:
            return load_preferences(cfg)
        return load_with_class_column(cfg) if calibrates_by_class(cfg) else None

    def pre_model_load(self, cfg) -> None:
        if cfg.adapter == ADAPTER and quantised.is_quantised(cfg):
            quantised.fill_in(cfg)

    def post_model_build(self, cfg, model) -> None:
        if cfg.adapter == ADAPTER and quantised.is_quantised(cfg):
            quantised.prepare(cfg, model)

    def load_adapter(self, model, cfg, inference: bool = False, config_only: bool = False):
        """Wrap the model with a fresh adapter, or with the one in `lora_model_dir`.

        With `config_only` (`rl: dpo`, `ipo` and `kto`) TRL wraps it.
        """
        if cfg.adapter != ADAPTER:
            return None
        if config_only and starts_from_sft(cfg):
            check_continued_adapter(cfg)
            return None, start_config(cfg)
        options = {}
        if cfg.peft_autocast_adapter_dtype is not None:
            options["autocast_adapter_dtype"] = cfg.peft_autocast_adapter_dtype
        if cfg.lora_model_dir:
            settle_merging(cfg)
            check_continued_adapter(cfg)
            model = PeftModel.from_pretrained(
                model, cfg.lora_model_dir, is_trainable=not inference, **options
            )
            config = model.peft_config["default"]
        else:
            with in_yaml_words(cfg):
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

    def post_train(self, cfg, model) -> None:
        # Called twice, the second time when everything is saved, with what Axolotl holds.
        if cfg.adapter == ADAPTER and not isinstance(model, PeftModel):
            vars(model).pop("save_pretrained", None)  # see `save_adapter_alone`

    def post_trainer_create(self, cfg, trainer) -> None:
        if cfg.adapter != ADAPTER:
            return
        settle_resuming(cfg)
        check_resumed_adapter(cfg, trainer.model.peft_config["default"])
        self.callback_class.attach(trainer, cfg)
        if cfg.rl in WITH_REFERENCE:
            save_adapter_alone(trainer)
        if cfg.fsdp_config:
            # After training Axolotl would look for a sharded model in the last checkpoint; what is
            # saved is the adapter, whole.
            cfg.fsdp_config.final_state_dict_type = "FULL_STATE_DICT"


def named_plugins(cfg: dict) -> list[str]:
    """The plugins that a YAML names, each as `package.Class`.

    Raises:
        SpftError: it names them in another way than a list.
    """
    plugins = cfg.get("plugins") or []
    if not isinstance(plugins, list):
        raise SpftError(f"plugins is {plugins!r}; it must be a list: plugins: [{NAME}]")
    return [str(name).replace(":", ".") for name in plugins]


def _refuse_other_names(named: list[str]) -> None:
    """Under two names Axolotl would take the plugin for two."""
    for name in named:
        if name.startswith("axolotl_spft.") and name != NAME:
            raise SpftError(f"plugins names {name}, the plugin is {NAME}; write that")


def _refuse_ignored_adapter(cfg: dict) -> None:
    """Refuse a YAML whose adapter Axolotl would leave out, to train the whole model instead."""
    if cfg.get("lora_model_dir") and not cfg.get("adapter"):
        raise SpftError(
            f"lora_model_dir is {cfg['lora_model_dir']!r} but adapter is not set, so the whole "
            f"model would be trained without it; set adapter: {ADAPTER}, or drop lora_model_dir"
        )


def _show_mistakes_in_one_line(cfg: dict) -> None:
    """Print a user's mistake without a traceback when it ends the program, in the YAML's words.

    TRL puts adapters in outside of our hooks, so this is where those mistakes get the YAML's words.
    """
    others = getattr(sys.excepthook, "others", sys.excepthook)

    def hook(kind, error, traceback):
        if issubclass(kind, SpftError):
            show_mistake(error.renamed(yaml_names(DictDefault(cfg))))
        else:
            others(kind, error, traceback)

    hook.others = others
    sys.excepthook = hook

"""Adapters on disk that a YAML goes on with: refused in one line where they do not fit it."""

from __future__ import annotations

import logging
from pathlib import Path

from peft import PeftConfig

from trainer_ext import SpftConfig, SpftError
from trainer_ext.checkpoints.folders import last_complete
from trainer_ext.config.spft_config import DEFAULT_R
from trainer_ext.files.adapter_file import AdapterFile

from .args import YAML_NAMES

logger = logging.getLogger(__name__)


def check_continued_adapter(cfg) -> None:
    """Check the adapter in `lora_model_dir`, which governs.

    Raises:
        SpftError: the folder holds no SPFT adapter, or one whose budget the YAML contradicts.
    """
    folder = cfg.lora_model_dir
    saved = _read(folder, f"lora_model_dir is {folder!r}")
    bounds = {name: getattr(saved, name) for name in ("allocation_floor", "allocation_ceiling")}
    for field, has in {**_budget(saved), **bounds}.items():
        key = YAML_NAMES[field]
        wanted = cfg[key]
        if wanted is not None and _differ(wanted, has):
            raise SpftError(
                f"{key} is {wanted} but the adapter in {folder!r} was made with "
                f"{_in_words(saved, field)}; drop {key}, or start a fresh adapter without "
                "lora_model_dir"
            )
    _warn_of_other_neurons(cfg, saved)


def settle_merging(cfg) -> None:
    """Let `axolotl merge-lora` of a YAML that began with the adapter in `lora_model_dir` merge what
    was trained from it; Axolotl would merge what is named, which is the beginning."""
    made = cfg.output_dir
    if not cfg.merge_lora or not Path(made or "", "adapter_config.json").is_file():
        return
    started = getattr(PeftConfig.from_pretrained(made), "start_adapter", None)
    if started and Path(started).resolve() == Path(cfg.lora_model_dir).resolve():
        logger.warning("merging %s, which was trained from %s", made, cfg.lora_model_dir)
        cfg.lora_model_dir = made


def _warn_of_other_neurons(cfg, saved: SpftConfig) -> None:
    """Say which keys have no say any more, since the saved adapter's neurons are chosen."""
    differing = []
    for field in ("importance", "target_modules", "exclude_modules"):
        wanted, has = cfg[YAML_NAMES[field]], getattr(saved, field)
        if isinstance(wanted, list) and isinstance(has, list):
            wanted, has = sorted(wanted), sorted(has)
        if wanted is not None and wanted != has:
            differing.append(YAML_NAMES[field])
    if differing:
        logger.warning(
            "the adapter in lora_model_dir %s keeps its own neurons; %s differs from what it was "
            "made with and has no effect",
            cfg.lora_model_dir,
            ", ".join(differing),
        )


def settle_resuming(cfg) -> None:
    """Let `auto_resume_from_checkpoints` go on from the last complete checkpoint, if there is one.

    Axolotl's own search takes the last one that has begun to be written.
    """
    if cfg.auto_resume_from_checkpoints and cfg.resume_from_checkpoint is None:
        cfg.resume_from_checkpoint = last_complete(cfg.output_dir)
        cfg.auto_resume_from_checkpoints = cfg.resume_from_checkpoint is not None


def check_resumed_adapter(cfg, config: SpftConfig) -> None:
    """Check the checkpoint that training will be resumed from, if it will be.

    Args:
        config: configuration of the adapter that the checkpoint is loaded into.

    Raises:
        SpftError: the checkpoint holds no SPFT adapter, or one with another number of neurons.
    """
    folder, seen = cfg.resume_from_checkpoint, "resume_from_checkpoint is"
    if cfg.auto_resume_from_checkpoints:
        seen = "auto_resume_from_checkpoints found"
    if not isinstance(folder, str):
        return
    saved = _read(folder, f"{seen} {folder!r}")
    wanted = _budget(config)
    for field, has in _budget(saved).items():
        if _differ(wanted[field], has):
            raise SpftError(
                f"{seen} {folder!r}, whose adapter has {_in_words(saved, field)}, but this run "
                f"asks for {_in_words(config, field)}; ask for the same, or use another output_dir"
            )
    if saved.allocated != config.allocated:
        raise SpftError(
            f"{seen} {folder!r}, whose layers have other numbers of neurons than this run gives "
            f"them by spft_importance_file {config.importance_file!r}; use the file and bounds "
            "that the run began with, or another output_dir"
        )


def _read(folder: str, seen: str) -> SpftConfig:
    try:
        return AdapterFile.read_config(folder)
    except SpftError as error:
        raise error.within(seen) from None


def _budget(config: SpftConfig) -> dict[str, object]:
    """The fields that set the numbers of neurons, with the default of `r` filled in."""
    return {
        "r": (config.r or DEFAULT_R) if config.density is None else None,
        "density": config.density,
        "allocation": config.allocation,
        "r_pattern": config.r_pattern or None,
        "density_pattern": config.density_pattern or None,
    }


def _differ(a, b) -> bool:
    """Whether two values of a field ask for different things."""
    # of patterns the first that matches counts, so their order does too
    return a != b or (isinstance(a, dict) and list(a) != list(b))


def _in_words(config: SpftConfig, field: str) -> str:
    """What a configuration says where another has something else in `field`."""
    if field in ("r", "density"):
        field = "r" if config.density is None else "density"
    value = _budget(config).get(field, getattr(config, field))
    key = YAML_NAMES[field]
    return f"no {key}" if value is None else f"{key} = {value}"

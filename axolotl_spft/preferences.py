"""Preference training (`rl`) through Axolotl: its datasets, its reference and what it saves."""

from __future__ import annotations

from axolotl.common.datasets import TrainDatasetMeta, load_preference_datasets
from axolotl.utils.data.shared import datasets_with_name_generator, load_dataset_with_config

from trainer_ext import SpftError

# TRL wraps the model itself and takes it with the adapter off as the reference.
WITH_REFERENCE = ("dpo", "ipo", "kto")
METHODS = (*WITH_REFERENCE, "orpo", "simpo")


def starts_from_sft(cfg) -> bool:
    """Whether the adapter in `lora_model_dir` is where training, and so its reference, starts."""
    return bool(cfg.rl in WITH_REFERENCE and cfg.lora_model_dir and not cfg.merge_lora)


def load_preferences(cfg) -> TrainDatasetMeta:
    """Axolotl's preference datasets.

    Raises:
        SpftError: a dataset lacks a column that its type needs.
    """
    try:
        data = load_preference_datasets(cfg=cfg)
        if cfg.rl == "kto" and "label" not in data.train_dataset.column_names:
            raise KeyError("label")  # Axolotl leaves it to TRL's traceback
        return data
    except (KeyError, ValueError) as error:
        mistake = _missing_column(cfg, error)
        if mistake is None:
            raise
        raise mistake from None


def _missing_column(cfg, error: Exception) -> SpftError | None:
    """What Axolotl could not find in a row, if that is a column that the whole dataset lacks."""
    if isinstance(error, KeyError):
        needed = [str(error.args[0])]
    elif str(error).endswith("keys are required for DPO/ORPO datasets"):
        needed = ["prompt", "chosen", "rejected"]
    elif str(error).endswith("keys are required for KTO datasets"):
        needed = ["prompt", "completion", "label"]
    else:
        return None
    for dataset in datasets_with_name_generator([*cfg.datasets, *(cfg.test_datasets or [])]):
        rows = load_dataset_with_config(dataset, cfg.hf_use_auth_token, streaming=False)
        columns = rows.column_names
        if isinstance(columns, dict):  # of each split
            columns = next(iter(columns.values()))
        lacking = [name for name in needed if name not in columns]
        if lacking:
            return SpftError(
                f"the dataset {dataset.path} has no column {lacking[0]!r}, which rl: {_name(cfg)} "
                f"with type: {dataset.type} needs; it has: {', '.join(columns)}; rename one, or "
                "give the type that reads them"
            )
    return None


def _name(cfg) -> str:
    return getattr(cfg.rl, "value", cfg.rl)


def save_adapter_alone(trainer) -> None:
    """Let Axolotl save the adapter where it means to save the model that TRL has wrapped.

    It holds the model as it was before TRL put the adapter into it, and saves that after training
    and when interrupted: all frozen weights, under names that no loader knows.
    """
    base = trainer.model.get_base_model()
    base.save_pretrained = trainer.model.save_pretrained

"""Registers SPFT with PEFT, so that PEFT saves, loads, disables and merges it like its own."""

from __future__ import annotations

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
from peft.utils import register_peft_method

from ..config.peft_type import SPFT
from ..config.spft_config import SpftConfig
from .model import SpftModel


def register_spft() -> None:
    """Make `SpftConfig` and `SpftModel` known to PEFT; a second call does nothing."""
    if SPFT not in PEFT_TYPE_TO_CONFIG_MAPPING:
        register_peft_method(
            name="spft", config_cls=SpftConfig, model_cls=SpftModel, prefix=SpftModel.prefix
        )

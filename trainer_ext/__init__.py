"""Structured-pruning-based sparse fine-tuning for the Hugging Face Trainer.

Importing this package registers SPFT with PEFT. It needs torch, transformers, accelerate, peft and
safetensors only. `SpftSFTTrainer` and `SpftDPOTrainer` need TRL, which is imported at their first
use.
"""

from .versions import check_versions, imports_explained

with imports_explained():
    from .calibration import measure_importance, select_by_scores, select_neurons
    from .config import SpftConfig
    from .errors import SpftError
    from .merging import merge_checkpoint
    from .optim import SelectedNeuronAdamW
    from .scores import ImportanceScores
    from .selection import NeuronSelection, apply_selection, current_selection
    from .trainer import SpftCallback, SpftTrainer, SpftTrainerMixin
    from .tuner.layer import SpftLinear
    from .tuner.model import SpftModel, restore_base, write_through
    from .tuner.registration import register_spft
    from .tuner.trained import trained_parameters

register_spft()

__all__ = [
    "ImportanceScores",
    "NeuronSelection",
    "SelectedNeuronAdamW",
    "SpftCallback",
    "SpftConfig",
    "SpftError",
    "SpftLinear",
    "SpftModel",
    "SpftTrainer",
    "SpftTrainerMixin",
    "apply_selection",
    "current_selection",
    "measure_importance",
    "merge_checkpoint",
    "restore_base",
    "select_by_scores",
    "select_neurons",
    "trained_parameters",
    "write_through",
]


def __getattr__(name: str):
    if name not in ("SpftSFTTrainer", "SpftDPOTrainer"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        with imports_explained("trl"):
            from .trl_trainers import SpftDPOTrainer, SpftSFTTrainer
    except ModuleNotFoundError as error:
        if error.name != "trl":
            raise
        raise ImportError(f"{name} needs TRL, which is not installed: pip install trl") from None
    check_versions("trl")
    return {"SpftSFTTrainer": SpftSFTTrainer, "SpftDPOTrainer": SpftDPOTrainer}[name]

"""Structured-pruning-based sparse fine-tuning for the Hugging Face Trainer.

Importing this package registers SPFT with PEFT. It needs torch, transformers, accelerate, peft and
safetensors only. `SpftSFTTrainer` and `SpftDPOTrainer` need TRL, which is imported at their first
use.
"""

from .versions import check_versions, imports_explained, installed_version

with imports_explained():
    from .calibration.run import measure_importance, select_by_scores, select_neurons
    from .config.spft_config import SpftConfig
    from .errors import SpftError
    from .export.merge import merge_checkpoint
    from .optim import SelectedNeuronAdamW
    from .ranking.scores import ImportanceScores
    from .ranking.selection import NeuronSelection
    from .training.callback import SpftCallback
    from .training.trainers import SpftTrainer, SpftTrainerMixin, prepare_trainer
    from .tuner.layer import SpftLinear
    from .tuner.marks import trained_parameters
    from .tuner.model import SpftModel, restore_base, write_through, writing_through
    from .tuner.registration import register_spft
    from .tuner.selecting import apply_selection, current_selection

register_spft()
__version__ = installed_version()

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
    "prepare_trainer",
    "restore_base",
    "select_by_scores",
    "select_neurons",
    "trained_parameters",
    "write_through",
    "writing_through",
]


_OF_TRL = ("SpftDPOTrainer", "SpftSFTTrainer")


def __dir__() -> list[str]:
    return sorted([*globals(), *_OF_TRL])


def __getattr__(name: str):
    if name not in _OF_TRL:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        with imports_explained("trl"):
            from .training.trl import SpftDPOTrainer, SpftSFTTrainer
    except ModuleNotFoundError as error:
        if error.name != "trl":
            raise
        raise ImportError(f"{name} needs TRL, which is not installed: pip install trl") from None
    check_versions("trl")
    return {"SpftSFTTrainer": SpftSFTTrainer, "SpftDPOTrainer": SpftDPOTrainer}[name]

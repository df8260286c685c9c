"""TRL's supervised and preference trainers that train the selected neurons only.

`trainer_ext` exports them at first use, since nothing else in it needs TRL.
"""

from __future__ import annotations

from trl import DPOTrainer, SFTTrainer

from .errors import SpftError
from .trainer import SpftTrainerMixin


class SpftSFTTrainer(SpftTrainerMixin, SFTTrainer):
    """`trl.SFTTrainer` that trains the selected neurons only.

    `SpftSFTTrainer(model, args, train_dataset=..., spft_config=SpftConfig(r=64)).train()`
    """

    _task_type = "CAUSAL_LM"


class SpftDPOTrainer(SpftTrainerMixin, DPOTrainer):
    """`trl.DPOTrainer` that trains the selected neurons only; the reference is delta off.

    `SpftDPOTrainer(model, args=..., train_dataset=..., spft_config=SpftConfig(r=64)).train()`

    Raises:
        SpftError: a dataset has no preference pairs; see also `SpftTrainerMixin`.
    """

    _task_type = "CAUSAL_LM"

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        _check_pairs(dataset, dataset_name)
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)


def _check_pairs(dataset, name: str) -> None:
    if not hasattr(dataset, "map"):
        raise SpftError(
            f"the {name} dataset is a {type(dataset).__name__}; give a datasets.Dataset "
            "(datasets.Dataset.from_list makes one of a list of dicts)"
        )
    columns = sorted(next(iter(dataset), {}))
    if not columns:
        raise SpftError(f"the {name} dataset is empty; give preference pairs")
    missing = [name for name in ("chosen", "rejected") if name not in columns]
    if missing:
        raise SpftError(
            f"the {name} dataset has no column {' and no '.join(missing)}, only "
            f"{', '.join(columns)}; DPO needs chosen and rejected, and prompt unless both begin "
            "with it"
        )

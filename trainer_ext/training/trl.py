"""TRL's supervised and preference trainers that train the selected neurons only.

`trainer_ext` exports them at first use, since nothing else in it needs TRL.
"""

from __future__ import annotations

from peft import PeftModel
from transformers import TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTTrainer

from ..config.spft_config import SpftConfig
from ..errors import SpftError
from .trainers import SpftTrainerMixin


class SpftSFTTrainer(SpftTrainerMixin, SFTTrainer):
    """`trl.SFTTrainer` that trains the selected neurons only.

    `SpftSFTTrainer(model, args, train_dataset=..., spft_config=SpftConfig(r=64)).train()`

    Raises:
        SpftError: a dataset has nothing to train on; see also `SpftTrainerMixin`.
    """

    _task_type = "CAUSAL_LM"

    def __init__(self, *args, **kw):
        _refuse_no_rows(kw)
        super().__init__(*args, **kw)

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting, name):
        columns = set(next(iter(dataset), ()))
        accepted = (
            {args.dataset_text_field},
            {"messages"},
            {"conversations"},
            {"prompt", "completion"},
            {"input_ids"},
        )
        if formatting is None and not any(keys <= columns for keys in accepted):
            raise SpftError(
                f"the {name} dataset has only the columns {', '.join(sorted(columns))}; SFT needs "
                f"{args.dataset_text_field} (or set dataset_text_field), messages, or prompt and "
                "completion"
            )
        return super()._prepare_dataset(dataset, processing_class, args, packing, formatting, name)


class SpftDPOTrainer(SpftTrainerMixin, DPOTrainer):
    """`trl.DPOTrainer` that trains the selected neurons only.

    `SpftDPOTrainer(model, args=..., train_dataset=..., spft_config=SpftConfig(r=64)).train()`

    The reference is the model with delta off; of a PEFT model that is given instead of
    `spft_config`, it is the model as it is.

    Raises:
        SpftError: a dataset has no preference pairs, or there is a `ref_model`, or no adapter; see
            also `SpftTrainerMixin`.
    """

    _task_type = "CAUSAL_LM"

    def __init__(
        self,
        model=None,
        ref_model=None,
        args: DPOConfig | None = None,
        *more,
        spft_config: SpftConfig | None = None,
        **kw,
    ):
        if isinstance(ref_model, TrainingArguments):
            raise SpftError("DPO's second argument is ref_model; name the arguments: args=...")
        if ref_model is not None:
            raise SpftError(_SECOND_MODEL)
        if not isinstance(args, (DPOConfig, type(None))):
            raise SpftError(f"args is a {type(args).__name__}; DPO needs a trl.DPOConfig")
        if spft_config is None and kw.get("peft_config") is None:
            _check_adapter(model)
        _refuse_no_rows(kw)
        super().__init__(model, None, args, *more, spft_config=spft_config, **kw)

    def _prepare_dataset(self, dataset, processing_class, args, dataset_name):
        columns = next(iter(dataset), ())
        missing = [name for name in ("chosen", "rejected") if name not in columns]
        if missing:
            raise SpftError(
                f"the {dataset_name} dataset has no column {' and no '.join(missing)}, only "
                f"{', '.join(sorted(columns))}; DPO needs chosen and rejected, and prompt unless "
                "both begin with it"
            )
        if (
            args.precompute_ref_log_probs
            and args.world_size > 1
            and not getattr(dataset, "cache_files", True)
        ):
            raise SpftError(
                f"precompute_ref_log_probs with {args.world_size} processes needs the "
                f"{dataset_name} dataset on disk, where they share a cache: save_to_disk and "
                "datasets.load_from_disk, or leave precompute_ref_log_probs out"
            )
        return super()._prepare_dataset(dataset, processing_class, args, dataset_name)


_SECOND_MODEL = (
    "ref_model is given; SPFT's reference is the model with delta off, so leave it out. To start "
    "from a trained adapter, pass the PEFT model instead of spft_config"
)


def _check_adapter(model) -> None:
    if not isinstance(model, PeftModel):
        raise SpftError(
            f"the model is a {type(model).__name__} without an SPFT adapter; pass spft_config"
        )
    if "default" not in model.peft_config:
        raise SpftError(
            f"the model's adapter is named {', '.join(model.peft_config)}; TRL copies the one "
            "named default as the reference, so load it under that name"
        )


def _refuse_no_rows(arguments: dict) -> None:
    """TRL looks at the first rows before it prepares a dataset."""
    for name in ("train_dataset", "eval_dataset"):
        given = arguments.get(name)
        for dataset in given.values() if isinstance(given, dict) else (given,):
            if dataset is None:
                continue
            if not hasattr(dataset, "map"):
                raise SpftError(
                    f"{name} is a {type(dataset).__name__}; give a datasets.Dataset "
                    "(datasets.Dataset.from_list makes one of a list of dicts)"
                )
            if hasattr(dataset, "__len__") and not len(dataset):
                raise SpftError(f"{name} has no rows; check what it was filtered by")

"""Lets the column in `spft_class_field` survive Axolotl's tokenisation.

Axolotl's tokenisation drops every column of the raw data, and its prepared datasets are found by a
hash that knows nothing of ours. Both are changed for the loading of this one configuration and put
back after it, so other YAMLs in the same process are not touched.
"""

from __future__ import annotations

from contextlib import contextmanager

from axolotl.common.datasets import TrainDatasetMeta, load_datasets
from axolotl.datasets import TokenizedPromptDataset
from axolotl.utils.data import sft, shared

from trainer_ext import SpftError
from trainer_ext.config.registry import METRICS


def calibrates_by_class(cfg) -> bool:
    """Whether a configuration, raw or validated, needs the class of every row."""
    return (
        getattr(METRICS.get(cfg.get("spft_importance")), "needs_classes", False)
        and not cfg.get("spft_importance_file")
        and not cfg.get("lora_model_dir")  # its neurons are chosen
    )


def load_with_class_column(cfg) -> TrainDatasetMeta:
    """Axolotl's datasets, where each row of the training data keeps its `spft_class_field`.

    Rows, their order and their tokens are what they are without the column, but that
    `dataset_exact_deduplication` tells rows of different classes apart.

    Raises:
        SpftError: a training dataset has no such column.
    """
    field = cfg.spft_class_field
    load_one = sft._load_and_process_single_dataset

    def load_one_with_column(dataset_config, *args, split, **kwargs):
        if split != "train":  # evaluation data needs no classes, and need not have them
            return load_one(dataset_config, *args, split=split, **kwargs)
        with _tokenisation_keeps(field, dataset_config.path):
            return load_one(dataset_config, *args, split=split, **kwargs)

    hashed = (*shared.DATASET_HASH_CONFIG_EXTRA_FIELDS, "spft_class_field")
    with (
        _replaced(shared, "DATASET_HASH_CONFIG_EXTRA_FIELDS", hashed),
        _replaced(sft, "_load_and_process_single_dataset", load_one_with_column),
    ):
        return load_datasets(cfg=cfg)


@contextmanager
def _tokenisation_keeps(field: str, path: str):
    """While inside, tokenised datasets keep one column of the raw ones."""
    process = TokenizedPromptDataset.process

    def process_with_column(self, dataset):
        if field not in dataset.column_names:
            raise SpftError(
                f"spft_class_field is {field!r} but the dataset {path} has no such column; it has: "
                f"{', '.join(dataset.column_names)}; name the one that holds each row's class"
            )
        self.prompt_tokenizer = _WithColumn(self.prompt_tokenizer, field)
        return process(self, dataset)

    with _replaced(TokenizedPromptDataset, "process", process_with_column):
        yield


@contextmanager
def _replaced(owner, name: str, value):
    original = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


class _WithColumn:
    """A tokenising strategy whose rows keep one column; picklable, for dataset_num_proc."""

    def __init__(self, strategy, field: str) -> None:
        self.strategy = strategy
        self.field = field
        self.supports_batched = strategy.supports_batched
        if getattr(strategy, "filter_rows", None):
            self.filter_rows = strategy.filter_rows

    def tokenize_prompt(self, prompt: dict) -> dict:
        """Tokenise one raw row, or with `supports_batched` a dict of columns."""
        if not self.supports_batched:
            return {**self.strategy.tokenize_prompt(prompt), self.field: prompt[self.field]}
        # Row by row: a strategy may make several rows of one (completion cuts long ones), or none.
        columns: dict[str, list] = {}
        for i, value in enumerate(prompt[self.field]):
            rows = self.strategy.tokenize_prompt({name: [v[i]] for name, v in prompt.items()})
            for name, values in rows.items():
                columns.setdefault(name, []).extend(values)
            count = len(next(iter(rows.values()), ()))
            columns.setdefault(self.field, []).extend([value] * count)
        return columns

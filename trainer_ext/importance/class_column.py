"""The class of every row of a batch: from a dataset column to the metric, past the model.

The data collator turns the column into class ids under `CLASS_KEY`; a hook on the PEFT model takes
them out again before the model's own forward, so that only the calibration ever sees them.

Shapes: B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.utils.data import IterableDataset

from ..config.registry import METRICS
from ..errors import SpftError

CLASS_KEY = "spft_class"  # in a batch: int64 (B,), the class id of each row

_ELSE = "or use another `importance` (group_taylor)"
# Arguments of trainers (Axolotl, TRL) that put several sequences into one row.
_PACKING = ("sample_packing", "packing", "padding_free")


def calibrates_by_class(config) -> bool:
    """Whether a calibration by an SpftConfig needs the class of every row."""
    return METRICS[config.importance].needs_classes and not config.importance_file


def add_class_column(trainer, field: str) -> None:
    """Let a trainer's batches carry the class of every row under `CLASS_KEY`.

    Call it before the training data loader is built. Class ids are positions in the sorted list of
    the training dataset's distinct values, so they are the same on all processes.

    Args:
        field: column of `trainer.train_dataset` with a string, whole number or boolean in each row.

    Raises:
        SpftError: the column is missing, has missing or other values or just one, the dataset is a
            stream, or rows are packed.
    """
    if trainer.train_dataset is None or isinstance(trainer.data_collator, _WithClasses):
        return
    for name in _PACKING:
        if getattr(trainer.args, name, False):
            raise SpftError(
                f"{name} is {getattr(trainer.args, name)!r} with `importance` 'quantile_mean': one "
                f"row would hold several sequences, each of its own class; drop {name}, {_ELSE}"
            )
    columns, values = _columns_and_values(trainer.train_dataset, field)
    ids = {_key(value): i for i, value in enumerate(_sorted_classes(field, values))}
    trainer._set_signature_columns_if_needed()
    # A classifier's own label column stays in the rows; of all others the model knows nothing.
    stays = field in trainer._signature_columns and (field == "labels" or "labels" not in columns)
    if field not in trainer._signature_columns:  # columns outside this list are dropped
        trainer._signature_columns.append(field)
    # Axolotl's trainer has a second collator, for evaluation; its rows may have the column too.
    for name in ("data_collator", "eval_data_collator"):
        if getattr(trainer, name, None) is not None:
            setattr(trainer, name, _WithClasses(getattr(trainer, name), field, ids, stays))


def hide_classes(model: nn.Module) -> None:
    """Take `CLASS_KEY` out of everything that a PEFT model is called with, from now on.

    The hook sits on the PEFT model itself, below the wrappers of engines, and holds nothing.
    """
    if _drop_classes not in model._forward_pre_hooks.values():
        model.register_forward_pre_hook(_drop_classes, with_kwargs=True)


class RowClasses:
    """The classes of the batch that a model is working on.

    Attributes:
        current: int64 (B,) of the model's latest call, or None if that batch carried none.
    """

    def __init__(self) -> None:
        self.current: torch.Tensor | None = None

    @classmethod
    @contextmanager
    def installed(cls, model: nn.Module) -> Iterator[RowClasses]:
        """While inside, take the classes out of every call of a PEFT model and keep the latest."""
        classes = cls()
        # first in line: the permanent hook would take them away
        handle = model.register_forward_pre_hook(classes._take, with_kwargs=True, prepend=True)
        try:
            yield classes
        finally:
            handle.remove()

    def _take(self, model, args, kwargs):
        self.current = kwargs.pop(CLASS_KEY, None)
        if self.current is not None:
            _check_rows(self.current, kwargs)
        return args, kwargs


class _WithClasses:
    """A data collator around another one; picklable, for data loader workers.

    Args:
        inner: collator of the remaining columns; gives a dict.
        ids: `_key` of a class's value -> its id.
        stays: whether the inner collator gets the column as well.
    """

    def __init__(self, inner, field: str, ids: dict[tuple, int], stays: bool) -> None:
        self.inner = inner
        self.field = field
        self.ids = ids
        self.stays = stays

    def __call__(self, features: list, *args, **kwargs):
        classes = [
            self.ids.get(_key(row[self.field]))
            for row in features
            if isinstance(row, Mapping) and self.field in row
        ]
        if classes and not self.stays:
            # copies: the rows may be the user's own
            features = [{k: v for k, v in row.items() if k != self.field} for row in features]
        batch = self.inner(features, *args, **kwargs)
        # Evaluation rows may lack the column, or have classes that the training data has not.
        if len(classes) == len(features) and None not in classes:
            batch[CLASS_KEY] = torch.tensor(classes, dtype=torch.int64)
        return batch


def _drop_classes(model, args, kwargs):
    kwargs.pop(CLASS_KEY, None)
    return args, kwargs


def _check_rows(classes_B: torch.Tensor, inputs: dict) -> None:
    tensors = [inputs.get("input_ids"), *inputs.values()]
    tensors = [t for t in tensors if isinstance(t, torch.Tensor) and t.ndim]
    if tensors and len(tensors[0]) != len(classes_B):
        raise SpftError(
            f"a calibration batch has {len(tensors[0])} rows but {len(classes_B)} classes in "
            f"{CLASS_KEY!r}: `importance` 'quantile_mean' needs one sequence with one class in "
            f"each row; use a data collator that pads and does not pack, {_ELSE}"
        )


def _columns_and_values(dataset, field: str) -> tuple[list[str], list]:
    """Column names of a dataset, and the distinct values in one of them."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__"):
        raise SpftError(
            f"`class_field` is {field!r} but the training dataset ({type(dataset).__name__}) is a "
            f"stream, whose classes cannot be known before training; load it whole, {_ELSE}"
        )
    columns = getattr(dataset, "column_names", None)
    if columns is None and len(dataset):
        row = dataset[0]
        columns = list(row) if isinstance(row, Mapping) else []
    if not columns or field not in columns:
        raise SpftError(
            f"`class_field` is {field!r} but the training dataset has no such column; it has: "
            f"{', '.join(columns or ()) or 'none'}; name the one that holds each row's class"
        )
    if hasattr(dataset, "unique"):  # datasets.Dataset; its unique() cannot do lists
        first = dataset[0][field]
        values = [first] if isinstance(first, (list, Mapping)) else dataset.unique(field)
    else:
        values = (dataset[i].get(field) for i in range(len(dataset)))
    return columns, list({_key(value): _plain(value) for value in values}.values())


def _sorted_classes(field: str, values: list) -> list:
    for value in values:
        if value is None:
            raise SpftError(
                f"`class_field` is {field!r} but rows of the training dataset have no value in "
                "that column; give every row a class, or leave these rows out"
            )
        if not isinstance(value, (str, int)):  # a bool is an int
            raise SpftError(
                f"`class_field` is {field!r} but that column holds a {type(value).__name__} "
                f"({str(value)[:40]}); allowed are strings, whole numbers and booleans"
            )
    if len(values) < 2:
        raise SpftError(
            f"`class_field` is {field!r} but that column is single-valued "
            f"({', '.join(map(repr, values))}); name a column with at least two classes, {_ELSE}"
        )
    return sorted(values, key=_key)


def _plain(value):
    """A value as plain Python has it; datasets may be set to give tensors or arrays."""
    single = isinstance(value, np.generic) or (isinstance(value, torch.Tensor) and not value.ndim)
    return value.item() if single else value


def _key(value) -> tuple:
    """What classes are told apart and sorted by: True is not 1, and '1' neither."""
    value = _plain(value)
    hashable = isinstance(value, (str, int, float, type(None)))
    return type(value).__name__, value if hashable else str(value)

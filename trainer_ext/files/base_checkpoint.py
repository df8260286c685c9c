"""The safetensors files that a base model was loaded from: found, and read row by row."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from ..errors import SpftError
from .stored_tensor import StoredTensor


@dataclass(frozen=True)
class BaseCheckpoint:
    """A model's checkpoint on this disk.

    Attributes:
        source: folder or hub name, as the model was loaded by.
        tensors: by name.
    """

    source: str
    tensors: dict[str, StoredTensor]

    @classmethod
    def find(cls, source: str, revision: str | None = None) -> BaseCheckpoint:
        """The checkpoint in a folder, or of a hub model that has been downloaded.

        Raises:
            SpftError: it is not on this disk, or has no safetensors files.
        """
        if not source:
            raise SpftError("the model does not say which checkpoint it was loaded from")
        # in the order in which transformers looks for them
        single = _located(source, SAFE_WEIGHTS_NAME, revision)
        index = None if single else _located(source, SAFE_WEIGHTS_INDEX_NAME, revision)
        if single:
            return cls(source, StoredTensor.all_in(Path(single)))
        if index:
            tensors = {}
            for shard in sorted(set(json.loads(Path(index).read_text())["weight_map"].values())):
                path = _located(source, shard, revision)
                if path is None:
                    raise SpftError(
                        f"the checkpoint {source!r} lacks {shard}, which its "
                        f"{SAFE_WEIGHTS_INDEX_NAME} names; download or copy it anew"
                    )
                tensors |= StoredTensor.all_in(Path(path))
            return cls(source, tensors)
        if _located(source, "config.json", revision) is None:
            raise SpftError(f"the checkpoint {source!r} was not found on this disk")
        raise SpftError(
            f"the checkpoint {source!r} has no safetensors file ({SAFE_WEIGHTS_NAME} or "
            f"{SAFE_WEIGHTS_INDEX_NAME}); convert it: load the model and call "
            "save_pretrained(folder)"
        )

    @classmethod
    def of(cls, model) -> BaseCheckpoint:
        """The checkpoint that a model was loaded from; errors as of `find`."""
        config = getattr(model, "config", None)
        return cls.find(getattr(model, "name_or_path", ""), getattr(config, "_commit_hash", None))

    def weight(self, layer: str) -> StoredTensor:
        """A layer's weight.

        Args:
            layer: the layer's name in the base model; models with a head and checkpoints without
                one differ by a prefix, which may be on either side.

        Raises:
            SpftError: there is no such tensor, or more than one.
        """
        return self.tensor(f"{layer}.weight")

    def tensor(self, wanted: str) -> StoredTensor:
        """As `weight`, by the tensor's own name."""
        if wanted in self.tensors:
            return self.tensors[wanted]
        found = [n for n in self.tensors if wanted.endswith(f".{n}") or n.endswith(f".{wanted}")]
        if len(found) != 1:
            raise SpftError(
                f"the checkpoint {self.source!r} has {len(found) or 'no'} tensors that could be "
                f"{wanted}; it may be of another model, or stored in another form than the model's"
            )
        return self.tensors[found[0]]

    def rows(self, layer: str, index: torch.Tensor, columns: bool = False) -> torch.Tensor:
        """Weights of some neurons of a layer, (r, d_in) in the checkpoint's dtype.

        Args:
            index: int64 (r,).
            columns: the tensor is stored (d_in, d_out), so neurons are its columns.

        Raises:
            SpftError: see `weight` and `StoredTensor.dtype`; or it has no such neurons.
        """
        stored = self.weight(layer)
        neurons = stored.shape[1 if columns else 0] if len(stored.shape) == 2 else 0
        if stored.dtype and int(index.max()) >= neurons:
            raise SpftError(
                f"{stored.name} in the checkpoint {self.source!r} has the shape {stored.shape}, "
                f"which has no neuron {int(index.max())}; it is the checkpoint of another model"
            )
        return stored.read(index, columns)


def _located(source: str, name: str, revision: str | None) -> str | None:
    if os.path.isdir(source):
        path = os.path.join(source, name)
        return path if os.path.isfile(path) else None
    try:
        return cached_file(
            source,
            name,
            revision=revision,
            local_files_only=True,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            _raise_exceptions_for_gated_repo=False,
        )
    except OSError:  # no name of a hub model either
        return None

"""The safetensors files that a base model was loaded from, read row by row.

Nothing here loads a whole tensor: files are mapped, and of a tensor the asked rows are copied.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from .errors import SpftError

_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


@dataclass(frozen=True)
class BaseCheckpoint:
    """A model's checkpoint on this disk.

    Attributes:
        source: folder or hub name, as the model was loaded by.
        files: tensor name -> the file that holds it.
    """

    source: str
    files: dict[str, Path]

    @classmethod
    def find(cls, source: str, revision: str | None = None) -> BaseCheckpoint:
        """The checkpoint in a folder, or of a hub model that has been downloaded.

        Raises:
            SpftError: it is not on this disk, or has no safetensors files.
        """
        if not source:
            raise SpftError("the model does not say which checkpoint it was loaded from")
        index = _located(source, SAFE_WEIGHTS_INDEX_NAME, revision)
        single = None if index else _located(source, SAFE_WEIGHTS_NAME, revision)
        if single:
            return cls(source, dict.fromkeys(_names_in(Path(single)), Path(single)))
        if index:
            shards = json.loads(Path(index).read_text())["weight_map"]
            paths = {shard: _located(source, shard, revision) for shard in set(shards.values())}
            missing = sorted(shard for shard, path in paths.items() if path is None)
            if missing:
                raise SpftError(
                    f"the checkpoint {source!r} lacks {missing[0]}, which its "
                    f"{SAFE_WEIGHTS_INDEX_NAME} names; download or copy it anew"
                )
            return cls(source, {name: Path(paths[shard]) for name, shard in shards.items()})
        if _located(source, "config.json", revision) is None:
            raise SpftError(f"the checkpoint {source!r} was not found on this disk")
        raise SpftError(
            f"the checkpoint {source!r} has no safetensors file ({SAFE_WEIGHTS_NAME} or "
            f"{SAFE_WEIGHTS_INDEX_NAME}); convert it: load the model and call "
            "save_pretrained(folder)"
        )

    def weight_name(self, layer: str) -> str:
        """Name of the tensor that holds a layer's weight.

        Args:
            layer: the layer's name in the base model; models with a head and checkpoints without
                one differ by a prefix, which may be on either side.

        Raises:
            SpftError: there is no such tensor, or more than one.
        """
        wanted = f"{layer}.weight"
        if wanted in self.files:
            return wanted
        found = [n for n in self.files if wanted.endswith(f".{n}") or n.endswith(f".{wanted}")]
        if len(found) != 1:
            raise SpftError(
                f"the checkpoint {self.source!r} has {len(found) or 'no'} tensors that could be "
                f"{wanted}; it may be of another model, or stored in another form than the model's"
            )
        return found[0]

    def dtype(self, layer: str) -> torch.dtype:
        """Of a layer's weight.

        Raises:
            SpftError: see `weight_name`; or the weight is quantised in the checkpoint itself.
        """
        name = self.weight_name(layer)
        with _opened(self.files[name]) as file:
            kind = file.get_slice(name).get_dtype()
        if kind not in _FLOATS:
            raise SpftError(
                f"the checkpoint {self.source!r} holds {name} as {kind}, so it is quantised "
                "itself and has no original rows; load the unquantised model by load_in_4bit or "
                "load_in_8bit"
            )
        return _FLOATS[kind]

    def rows(self, layer: str, index: torch.Tensor, columns: bool = False) -> torch.Tensor:
        """Weights of some neurons of a layer, (r, d_in) in the checkpoint's dtype.

        Args:
            index: int64 (r,).
            columns: the tensor is stored (d_in, d_out), so neurons are its columns.

        Raises:
            SpftError: see `dtype`; or the tensor has no such neurons.
        """
        self.dtype(layer)
        name = self.weight_name(layer)
        with _opened(self.files[name]) as file:
            tensor = file.get_slice(name)
            shape = tensor.get_shape()
            if len(shape) != 2 or int(index.max()) >= shape[1 if columns else 0]:
                raise SpftError(
                    f"{name} in the checkpoint {self.source!r} has the shape {tuple(shape)}, which "
                    f"has no neuron {int(index.max())}; it is the checkpoint of another model"
                )
            if columns:
                return torch.cat([tensor[:, i : i + 1] for i in index.tolist()], dim=1).t()
            return torch.cat([tensor[i : i + 1] for i in index.tolist()])


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


def _names_in(path: Path) -> list[str]:
    with _opened(path) as file:
        return list(file.keys())


def _opened(path: Path):
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise SpftError(
            f"{path} is not a whole safetensors file ({error}); download or copy it anew"
        ) from None

"""Merges an adapter into its base's checkpoint, file by file, without loading a model.

The rule, whatever the adapter was trained on: the original checkpoint with W + delta in the trained
neurons' rows, or anchor + delta where the adapter has an anchor, rounded to the checkpoint's dtype.
Every other byte is copied. So what was trained over a quantised base is served over the original
weights: the rows that were not trained lose their quantisation error.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..errors import SpftError
from ..files.adapter_file import AdapterFile
from ..files.base_checkpoint import BaseCheckpoint
from ..files.stored_tensor import StoredTensor


def merge_checkpoint(
    adapter: str | os.PathLike, output: str | os.PathLike, base: str | os.PathLike | None = None
) -> Path:
    """Write a model folder whose weights hold an adapter's update.

    In memory there are the adapter and, of the checkpoint, one layer's trained rows; the operating
    system copies the files.

    Args:
        adapter: folder of a saved SPFT adapter.
        output: folder to make; it appears when it is whole.
        base: folder or hub name of the original checkpoint; by default the one that the adapter
            names.

    Returns:
        `output`.

    Raises:
        SpftError: there is no such adapter or checkpoint, they do not belong together, a merged
            row is not finite, or `output` exists.
    """
    output = Path(output)
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise SpftError(f"the output {str(output)!r} exists; name a new folder")
    saved = AdapterFile.read(str(adapter))
    source = str(base or saved.config.base_model_name_or_path or "")
    checkpoint = BaseCheckpoint.find(source, None if base else saved.config.revision)
    merged = {checkpoint.weight(layer): tensors for layer, tensors in saved.layers.items()}
    replaced = {_whole(checkpoint, name): tensor for name, tensor in saved.whole.items()}
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SpftError(f"the output {str(output)!r} cannot be made: {error.strerror}") from None
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        _copy(checkpoint, Path(folder) / "model")
        conv1d = _conv1d_weights(Path(folder) / "model")
        for stored, tensors in merged.items():
            _merge_rows(_in(Path(folder) / "model", stored), tensors, conv1d)
        for stored, tensor in replaced.items():
            _replace(_in(Path(folder) / "model", stored), tensor)
        if output.exists():
            output.rmdir()
        os.replace(Path(folder) / "model", output)
    return output


def _whole(checkpoint: BaseCheckpoint, name: str) -> StoredTensor:
    """Where a module that was trained whole is stored, by itself."""
    mend = "merge by PEFT's merge_and_unload (axolotl merge-lora)"
    if name not in checkpoint.tensors:
        raise SpftError(
            f"{name} was trained whole, but the checkpoint {checkpoint.source!r} has no tensor of "
            f"that name; {mend}"
        )
    stored = checkpoint.tensors[name]
    try:
        config = AutoConfig.from_pretrained(stored.path.parent, trust_remote_code=False)
    except (OSError, ValueError):
        raise SpftError(
            f"{name} was trained whole, and the checkpoint {checkpoint.source!r} does not say "
            f"whether others share its weight; {mend}"
        ) from None
    text = config.get_text_config()
    if text.tie_word_embeddings and stored.shape[0] == text.vocab_size:
        raise SpftError(
            f"{name} was trained whole, and in the checkpoint {checkpoint.source!r} it is the "
            f"head's weight too, which was not trained; {mend}, which unties them"
        )
    return stored


def _copy(checkpoint: BaseCheckpoint, folder: Path) -> None:
    """Copy the checkpoint's safetensors files and whatever small files stand beside them."""
    folder.mkdir()
    used = {stored.path for stored in checkpoint.tensors.values()}
    beside = {path for file in used for path in file.parent.iterdir() if path.is_file()}
    for path in sorted(used | {p for p in beside if not _is_other_weights(p)}):
        shutil.copyfile(path, folder / path.name)


def _is_other_weights(path: Path) -> bool:
    """Weights in other forms would be those of the base."""
    return path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack") or (
        path.name.endswith(".index.json") and path.name != SAFE_WEIGHTS_INDEX_NAME
    )


def _in(folder: Path, stored: StoredTensor) -> StoredTensor:
    """The same tensor in the file's copy."""
    return replace(stored, path=folder / stored.path.name)


def _merge_rows(
    stored: StoredTensor, tensors: dict[str, torch.Tensor], conv1d: tuple[str, ...]
) -> None:
    index, delta, anchor = tensors["index"], tensors["weight"], tensors.get("anchor")
    d_in, shape = delta.shape[1], stored.shape
    columns = f".{stored.name}".endswith(conv1d)
    if len(shape) != 2 or shape[1 - columns] != d_in or int(index.max()) >= shape[columns]:
        raise SpftError(
            f"{stored.name} in the checkpoint has the shape {shape}, which does not fit the "
            f"adapter's neurons with {d_in} inputs; give the checkpoint that it was trained on"
        )
    start = stored.read(index, columns) if anchor is None else anchor
    rows = (start + delta).to(stored.dtype)
    if not torch.isfinite(rows).all():
        raise SpftError(
            f"the adapter has non-finite values for {stored.name} and was not merged; merge an "
            "earlier checkpoint"
        )
    stored.write(index, rows, columns)


def _conv1d_weights(folder: Path) -> tuple[str, ...]:
    """Endings of the tensors whose neurons are columns, by the model's architecture."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        with torch.device("meta"):
            model = getattr(transformers, config.architectures[0])(config)
    except (AttributeError, OSError, TypeError, ValueError):  # code of the checkpoint's own
        return ()
    # without the prefix that a checkpoint of the model without its head lacks
    prefix = f"{model.base_model_prefix}."
    return tuple(
        f".{name.removeprefix(prefix)}.weight"
        for name, module in model.named_modules()
        if isinstance(module, Conv1D)
    )


def _replace(stored: StoredTensor, tensor: torch.Tensor) -> None:
    if stored.shape != tuple(tensor.shape):
        raise SpftError(
            f"{stored.name} has the shape {stored.shape} in the checkpoint and "
            f"{tuple(tensor.shape)} in the adapter; merge by PEFT's merge_and_unload, which can "
            "resize it"
        )
    stored.replace(tensor)

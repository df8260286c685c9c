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
from peft import PeftConfig
from peft.utils import load_peft_weights
from transformers import AutoConfig
from transformers.pytorch_utils import Conv1D
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from .base_checkpoint import BaseCheckpoint
from .errors import SpftError
from .peft_type import add_peft_type
from .stored_tensor import StoredTensor

_PREFIX, _DELTA = "base_model.model.", ".spft_delta."


def merge_checkpoint(
    adapter: str | os.PathLike, output: str | os.PathLike, base: str | os.PathLike | None = None
) -> Path:
    """Write a model folder whose weights hold an adapter's update.

    Memory is bounded by one layer's trained rows; files are copied by the operating system.

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
    config, layers, whole = _read_adapter(str(adapter))
    source = str(base or config.base_model_name_or_path or "")
    checkpoint = BaseCheckpoint.find(source, None if base else config.revision)
    merged = {checkpoint.weight(layer): tensors for layer, tensors in layers.items()}
    replaced = {checkpoint.tensor(name): tensor for name, tensor in whole.items()}
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        _copy(checkpoint, Path(folder) / "model")
        for stored, tensors in merged.items():
            _merge_rows(_in(Path(folder) / "model", stored), tensors)
        for stored, tensor in replaced.items():
            _replace(_in(Path(folder) / "model", stored), tensor)
        if output.exists():
            output.rmdir()
        os.replace(Path(folder) / "model", output)
    return output


def _read_adapter(folder: str) -> tuple[PeftConfig, dict, dict]:
    """Configuration, tensors by layer and kind, and tensors of modules that were trained whole."""
    try:
        config = PeftConfig.from_pretrained(folder)
        tensors = load_peft_weights(folder, device="cpu")
    except (ValueError, OSError):
        raise SpftError(
            f"the adapter {folder!r} was not found, or lacks adapter_config.json or "
            "adapter_model.safetensors; give the folder that a training run wrote"
        ) from None
    if config.peft_type != add_peft_type("SPFT"):
        raise SpftError(
            f"the adapter {folder!r} is a {config.peft_type.value} adapter; merge it by PEFT"
        )
    layers: dict[str, dict[str, torch.Tensor]] = {}
    whole = {}
    for key, tensor in tensors.items():
        name, is_delta, kind = key.removeprefix(_PREFIX).partition(_DELTA)
        if is_delta:
            layers.setdefault(name, {})[kind] = tensor
        elif ".base_layer." not in key:  # PEFT saves a targeted head's own weight
            whole[name] = tensor
    for name, kinds in layers.items():
        if not kinds["selected"]:
            raise SpftError(
                f"the adapter {folder!r} has never been trained: the neurons of {name} are not "
                "selected; there is nothing to merge"
            )
    return config, layers, whole


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


def _merge_rows(stored: StoredTensor, tensors: dict[str, torch.Tensor]) -> None:
    index, delta, anchor = tensors["index"], tensors["weight"], tensors.get("anchor")
    d_in, shape = delta.shape[1], stored.shape
    fits = [len(shape) == 2 and shape[1 - neurons] == d_in for neurons in (0, 1)]
    columns = fits[1] and (not fits[0] or _is_conv1d(stored))
    if not any(fits) or int(index.max()) >= shape[int(columns)]:
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


def _is_conv1d(stored: StoredTensor) -> bool:
    """Whether a layer's neurons are columns, which the shape of a square weight does not show."""
    try:
        config = AutoConfig.from_pretrained(stored.path.parent)
        with torch.device("meta"):
            model = getattr(transformers, config.architectures[0])(config)
    except (AttributeError, OSError, TypeError, ValueError):  # code of the checkpoint's own
        return False
    return any(
        isinstance(module, Conv1D) and f"{name}.weight".endswith(stored.name)
        for name, module in model.named_modules()
    )


def _replace(stored: StoredTensor, tensor: torch.Tensor) -> None:
    if stored.shape != tuple(tensor.shape):
        raise SpftError(
            f"{stored.name} has the shape {stored.shape} in the checkpoint and "
            f"{tuple(tensor.shape)} in the adapter; merge by PEFT's merge_and_unload, which can "
            "resize it"
        )
    stored.replace(tensor)

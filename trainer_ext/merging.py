"""Merges an adapter into its base's checkpoint, file by file, without loading a model.

The rule, whatever the adapter was trained on: the original checkpoint with W + delta in the trained
neurons' rows, or anchor + delta where the adapter has an anchor, rounded to the checkpoint's dtype.
Every other byte is copied. So what was trained over a quantised base is served over the original
weights: the rows that were not trained lose their quantisation error.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path

import numpy as np
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

_PREFIX, _DELTA = "base_model.model.", ".spft_delta."
# numpy has no bf16: its elements are moved as bits
_NUMPY = {"F64": "<f8", "F32": "<f4", "F16": "<u2", "BF16": "<u2"}
_TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}


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
    names = {layer: checkpoint.weight_name(layer) for layer in layers}
    names |= {module: _whole_name(checkpoint, module) for module in whole}
    output.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        _copy(checkpoint, Path(folder) / "model")
        for layer, tensors in layers.items():
            file = Path(folder) / "model" / checkpoint.files[names[layer]].name
            _merge_rows(file, names[layer], layer, tensors)
        for module, tensor in whole.items():
            file = Path(folder) / "model" / checkpoint.files[names[module]].name
            _replace(file, names[module], tensor)
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


def _whole_name(checkpoint: BaseCheckpoint, module: str) -> str:
    layer, _, kind = module.rpartition(".")
    if kind == "weight":
        return checkpoint.weight_name(layer)
    if module in checkpoint.files:
        return module
    raise SpftError(f"the checkpoint {checkpoint.source!r} has no tensor {module}")


def _copy(checkpoint: BaseCheckpoint, folder: Path) -> None:
    """Copy the checkpoint's safetensors files and whatever small files stand beside them."""
    folder.mkdir()
    used = set(checkpoint.files.values())
    beside = {path for file in used for path in file.parent.iterdir() if path.is_file()}
    for path in sorted(used | {p for p in beside if not _is_other_weights(p)}):
        shutil.copyfile(path, folder / path.name)


def _is_other_weights(path: Path) -> bool:
    """Weights in other forms would be those of the base."""
    return path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack") or (
        path.name.endswith(".index.json") and path.name != SAFE_WEIGHTS_INDEX_NAME
    )


def _merge_rows(file: Path, name: str, layer: str, tensors: dict[str, torch.Tensor]) -> None:
    index, delta, anchor = tensors["index"], tensors["weight"], tensors.get("anchor")
    stored, dtype = _mapped(file, name)
    d_in = delta.shape[1]
    fits = [stored.ndim == 2 and stored.shape[1 - d] == d_in for d in (0, 1)]
    columns = fits[1] and (not fits[0] or _is_conv1d(file.parent, layer))
    rows_of = stored.T if columns else stored
    if not any(fits) or int(index.max()) >= len(rows_of):
        raise SpftError(
            f"{name} in the checkpoint has the shape {stored.shape}, which does not fit the "
            f"adapter's neurons with {d_in} inputs; give the checkpoint that it was trained on"
        )
    if anchor is None:
        anchor = _to_torch(rows_of[index.numpy()], dtype)
    rows = (anchor + delta).to(dtype)
    if not torch.isfinite(rows).all():
        raise SpftError(
            f"the adapter has non-finite values in {layer} and was not merged; merge an earlier "
            "checkpoint"
        )
    rows_of[index.numpy()] = _to_numpy(rows)
    stored.flush()


def _is_conv1d(folder: Path, layer: str) -> bool:
    """Whether a layer stores its neurons as columns, which the shape of a square weight hides."""
    try:
        config = AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = getattr(transformers, config.architectures[0])(config)
        return isinstance(model.get_submodule(layer), Conv1D)
    except (AttributeError, OSError, TypeError, ValueError):  # code of the checkpoint's own
        return False


def _replace(file: Path, name: str, tensor: torch.Tensor) -> None:
    stored, dtype = _mapped(file, name)
    if stored.shape != tuple(tensor.shape):
        raise SpftError(
            f"{name} has the shape {stored.shape} in the checkpoint and {tuple(tensor.shape)} in "
            "the adapter; merge by PEFT's merge_and_unload, which can resize it"
        )
    stored[...] = _to_numpy(tensor.to(dtype))
    stored.flush()


def _mapped(file: Path, name: str) -> tuple[np.memmap, torch.dtype]:
    """A tensor of a safetensors file as writable memory."""
    with file.open("rb") as opened:
        length = int.from_bytes(opened.read(8), "little")
        entry = json.loads(opened.read(length))[name]
    kind = entry["dtype"]
    if kind not in _NUMPY:
        raise SpftError(
            f"{name} is stored as {kind} in the checkpoint, so it is quantised; give the original "
            "checkpoint as the base"
        )
    offset = 8 + length + entry["data_offsets"][0]
    shape = tuple(entry["shape"])
    return np.memmap(file, _NUMPY[kind], "r+", offset, shape), _TORCH[kind]


def _to_torch(values: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    return torch.from_numpy(values.copy()).view(dtype)


def _to_numpy(tensor: torch.Tensor) -> np.ndarray:
    half = tensor.dtype in (torch.float16, torch.bfloat16)
    return (tensor.contiguous().view(torch.uint16) if half else tensor).numpy()

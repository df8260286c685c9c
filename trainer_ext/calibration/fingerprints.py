"""Fingerprints of the model and of the data that importance scores were made on."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from torch import nn

from ..distributed.processes import process_rank, sum_over_processes
from ..distributed.shards import ShardLayout, local_shard
from ..errors import SpftError
from ..importance.class_column import CLASS_KEY

_SAMPLES = 16  # weights of each layer that the fingerprint holds
_EMBEDDING_ROWS = 256  # of which it takes them, since vocabularies are padded and extended
# bf16 has 8 significant bits; fp16 has no normal numbers below 2^-14.
_RELATIVE, _ABSOLUTE = 2.0**-7, 2.0**-13
_LIMBS, _LIMB_BITS = 3, 20  # a sum of 60-bit numbers that fp64 reductions keep exact


def model_fingerprint(model: nn.Module, layers: Mapping[str, nn.Module]) -> str:
    """What tells a model from others, as JSON: its type, the layers' inputs, samples of weights.

    It does not depend on the loaded copy's dtype or engine: samples are compared with bf16's
    precision, and layers whose weights are quantised have none. All processes must ask.

    Args:
        layers: layer name in the base model -> SPFT layer.
    """
    weights = {name: layer.get_base_layer().weight for name, layer in layers.items()}
    samples = {
        name: _sampled(weight, None)
        for name, weight in weights.items()
        if layers[name].has_dense_weight
    }
    embeddings = _embedding_weight(model)
    if embeddings is not None:
        samples["input embeddings"] = _sampled(embeddings, _EMBEDDING_ROWS)
    samples = sum_over_processes(samples)
    return json.dumps(
        {
            "model_type": getattr(getattr(model, "config", None), "model_type", None),
            "in_features": {name: layer.in_features for name, layer in layers.items()},
            "samples": {name: _encoded(values) for name, values in samples.items()},
        }
    )


def check_same_model(made_for: str, here: str) -> None:
    """Compare two fingerprints of models whose layers have the same names and neurons.

    Args:
        made_for, here: of `model_fingerprint`; of the file's model and of this one.

    Raises:
        SpftError: names what differs.
    """
    theirs, ours = json.loads(made_for), json.loads(here)
    if theirs["model_type"] != ours["model_type"]:
        raise SpftError(
            f"the file was made for a {theirs['model_type']} model, but this is a "
            f"{ours['model_type']}; calibrate this model"
        )
    for name, inputs in theirs["in_features"].items():
        if ours["in_features"].get(name, inputs) != inputs:
            raise SpftError(
                f"layer {name} has {inputs} inputs in the file's model but "
                f"{ours['in_features'][name]} in this one; calibrate this model"
            )
    for name in theirs["samples"].keys() & ours["samples"].keys():
        a, b = _decoded(theirs["samples"][name]), _decoded(ours["samples"][name])
        if not torch.allclose(a, b, rtol=_RELATIVE, atol=_ABSOLUTE, equal_nan=True):
            raise SpftError(
                f"the weights of {name} are not those of the model that the file was made for: "
                "same architecture, other weights; calibrate this model"
            )


class DataFingerprint:
    """Fingerprint of the rows in some batches, whatever their order, padding or process."""

    def __init__(self) -> None:
        self._sum = 0

    def noting(self, batches: Iterable) -> Iterator:
        """The same batches, whose `micro_batches` are noted as they pass."""
        for batch in batches:
            for micro_batch in batch.micro_batches:
                self._sum += sum(map(_digest, _rows(micro_batch)))
            yield batch

    def value(self) -> str:
        """The fingerprint over all processes, all of which must ask."""
        limbs = [(self._sum >> (_LIMB_BITS * i)) % 2**_LIMB_BITS for i in range(_LIMBS)]
        limbs = sum_over_processes({"limbs": torch.tensor(limbs, dtype=torch.float64)})["limbs"]
        total = sum(int(limb) << (_LIMB_BITS * i) for i, limb in enumerate(limbs.tolist()))
        return f"{total % 2 ** (_LIMBS * _LIMB_BITS):015x}"


def _sampled(weight: torch.Tensor, first_rows: int | None) -> torch.Tensor:
    """Evenly spaced elements of a weight, fp64 (_SAMPLES,); zeros where another process holds them.

    Args:
        first_rows: take them from so many rows only.
    """
    layout = ShardLayout.of(weight)
    numel = layout.numel if first_rows is None else min(first_rows, layout.rows) * layout.columns
    positions = torch.tensor([numel * (2 * i + 1) // (2 * _SAMPLES) for i in range(_SAMPLES)])
    start, stop = layout.local_range(process_rank())
    held = (positions >= start) & (positions < stop)
    values = torch.zeros(_SAMPLES, dtype=torch.float64)
    local = local_shard(weight, layout)
    values[held] = local[(positions[held] - start).to(local.device)].double().cpu()
    return values


def _embedding_weight(model: nn.Module) -> torch.Tensor | None:
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    embeddings = getattr(embeddings, "original_module", embeddings)  # one of modules_to_save
    weight = getattr(embeddings, "weight", None)
    return weight if weight is not None and weight.is_floating_point() else None


def _encoded(values: torch.Tensor) -> str:
    return base64.b64encode(values.cpu().float().numpy().tobytes()).decode()


def _decoded(text: str) -> torch.Tensor:
    return torch.from_numpy(np.frombuffer(base64.b64decode(text), dtype=np.float32).copy())


def _rows(micro_batch) -> Iterator[bytes]:
    """What is hashed of a micro batch: each row's real tokens and labels, or all of it."""
    tokens = micro_batch.get("input_ids") if isinstance(micro_batch, Mapping) else None
    if not isinstance(tokens, torch.Tensor) or tokens.dim() != 2:
        yield _bytes_of(micro_batch)
        return
    mask, labels = micro_batch.get("attention_mask"), micro_batch.get("labels")
    for row in range(len(tokens)):
        real = torch.ones_like(tokens[row], dtype=torch.bool)
        if isinstance(mask, torch.Tensor) and mask.shape == tokens.shape:
            real = mask[row] != 0
        parts = [tokens[row][real]]
        if isinstance(labels, torch.Tensor):
            parts.append(labels[row][real] if labels.shape == tokens.shape else labels[row])
        yield b"|".join(_bytes_of(part) for part in parts)


def _bytes_of(value) -> bytes:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        return (value.float() if value.is_floating_point() else value.long()).numpy().tobytes()
    if isinstance(value, Mapping):
        keys = sorted(set(value) - {CLASS_KEY})  # there while calibrating by class alone
        return b"|".join(f"{key}=".encode() + _bytes_of(value[key]) for key in keys)
    if isinstance(value, (list, tuple)):
        return b"|".join(map(_bytes_of, value))
    return repr(value).encode()


def _digest(content: bytes) -> int:
    digest = hashlib.blake2b(content, digest_size=8).digest()
    return int.from_bytes(digest, "big") % 2 ** (_LIMBS * _LIMB_BITS)

"""A saved SPFT adapter, read without a model."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from peft import PeftConfig
from peft.utils import load_peft_weights
from safetensors import SafetensorError

from ..config.peft_type import SPFT
from ..config.spft_config import SpftConfig
from ..errors import SpftError

_PREFIX, _DELTA = "base_model.model.", ".spft_delta."


@dataclass(frozen=True)
class AdapterFile:
    """What a folder written by `save_pretrained` holds.

    Attributes:
        folder: the folder, or the name of a hub model.
        config: its configuration.
        layers: layer name in the base model -> `weight`, `index`, `selected` and, where the neurons
            start from other rows than the base's, `anchor`; see `NeuronDelta`. All are selected.
        whole: tensors of modules that were trained whole, by their names in the base model.
    """

    folder: str
    config: SpftConfig
    layers: dict[str, dict[str, torch.Tensor]]
    whole: dict[str, torch.Tensor]

    @staticmethod
    def read_config(folder: str) -> SpftConfig:
        """The configuration alone.

        Raises:
            SpftError: there is no adapter, or one of another method.
        """
        try:
            config = PeftConfig.from_pretrained(folder)
        except (ValueError, OSError):
            raise _missing(folder, "adapter_config.json") from None
        if config.peft_type != SPFT:
            raise SpftError(
                f"the adapter {folder!r} is a {config.peft_type.value} adapter; give one of SPFT"
            )
        return config

    @classmethod
    def read(cls, folder: str) -> AdapterFile:
        """Configuration and tensors, on the CPU.

        Raises:
            SpftError: see `read_config`; or tensors are missing, or it was never trained.
        """
        config = cls.read_config(folder)
        try:
            tensors = load_peft_weights(folder, device="cpu")
        except (ValueError, OSError, SafetensorError):
            raise _missing(folder, "adapter_model.safetensors") from None
        layers: dict[str, dict[str, torch.Tensor]] = {}
        whole = {}
        for key, tensor in tensors.items():
            name, is_delta, kind = key.removeprefix(_PREFIX).partition(_DELTA)
            if is_delta:
                layers.setdefault(name, {})[kind] = tensor
            elif ".base_layer." not in key:  # PEFT saves a targeted head's own weight
                whole[name] = tensor
        needed = {"weight", "index", "selected"}
        if config.anchor not in (None, "none"):
            needed.add("anchor")
        for name, kinds in layers.items():
            if not needed <= kinds.keys():
                raise SpftError(
                    f"the adapter {folder!r} lacks {', '.join(sorted(needed - kinds.keys()))} of "
                    f"{name}; its file is damaged, give another checkpoint"
                )
            if not kinds["selected"]:
                raise SpftError(
                    f"the adapter {folder!r} has never been trained: the neurons of {name} are "
                    "not selected; give one that has been"
                )
        return cls(folder, config, layers, whole)


def _missing(folder: str, file: str) -> SpftError:
    return SpftError(
        f"the adapter {folder!r} was not found, or has no whole {file}; give the folder that a "
        "training run wrote (its output_dir or a checkpoint)"
    )

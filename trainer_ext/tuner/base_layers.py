"""The linear layers that SPFT can be put around: dense, and of bitsandbytes in 4 or 8 bits."""

from __future__ import annotations

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..distributed.shards import ShardLayout, is_sharded
from ..errors import SpftError

# bitsandbytes' layers by their classes' names: it need not be installed, and an engine may put
# tensors of other classes in their weights' places.
_QUANTISED = {"Linear4bit": "4-bit", "Linear8bitLt": "8-bit"}
_SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def is_linear(layer: nn.Module) -> bool:
    """Whether SPFT can train neurons of the layer."""
    return isinstance(layer, (nn.Linear, Conv1D))


def quantisation_of(layer: nn.Module) -> str | None:
    """ "4-bit" or "8-bit" for a layer of bitsandbytes, else None."""
    names = (kind.__name__ for kind in type(layer).__mro__)
    return next((_QUANTISED[name] for name in names if name in _QUANTISED), None)


def linear_shape(layer: nn.Module, name: str) -> tuple[int, int]:
    """(d_in, d_out) of a supported linear layer.

    Raises:
        SpftError: the layer is of another kind, or quantised by something else than bitsandbytes.
    """
    if is_linear(layer):
        if quantisation_of(layer) is None and layer.weight.dtype not in _SUPPORTED_DTYPES:
            raise SpftError(
                f"layer {name} is a {type(layer).__name__} with weights in "
                f"{str(layer.weight.dtype).removeprefix('torch.')}; load the model in bf16, fp16, "
                "fp32, or by bitsandbytes in 4 or 8 bits"
            )
        if isinstance(layer, Conv1D):
            return layer.nx, layer.nf
        return layer.in_features, layer.out_features
    raise SpftError(
        f"`target_modules` matches {name}, a {type(layer).__name__}; SPFT trains neurons of "
        "nn.Linear and transformers' Conv1D, so narrow `target_modules` or list it in "
        "`exclude_modules`"
    )


def checkpoint_has_columns(layer: nn.Module) -> bool:
    """Whether the layer's neurons are columns of the weight in its checkpoint.

    transformers turns a Conv1D's weight when it quantises it.
    """
    return isinstance(layer, Conv1D) or getattr(layer, "source_cls", None) is Conv1D


def prepare_quantised(layer: nn.Module, name: str) -> None:
    """Keep bitsandbytes from repacking a 4-bit weight at its first evaluation on a CPU.

    Past that, forwards in train mode have no gradient, and the scales are rounded to bf16 for good.

    Raises:
        SpftError: it has been repacked already.
    """
    if quantisation_of(layer) != "4-bit":
        return
    if getattr(layer.weight.quant_state, "packing_format_for_cpu", False):
        raise SpftError(
            f"the 4-bit weight of {name} was repacked by an evaluation on the CPU and cannot be "
            "trained through any more; load the model anew and put the adapter in before it is used"
        )
    layer.support_avx512bf16_for_cpu = False


def dense_weight(layer: nn.Module, name: str = "") -> torch.Tensor:
    """The weight as stored, (d_out, d_in) or Conv1D's (d_in, d_out); dequantised if it is packed.

    Raises:
        SpftError: it is quantised and sharded, so that no process can dequantise it.
    """
    weight, kind = layer.weight, quantisation_of(layer)
    if kind is None:
        return weight
    if is_sharded(weight):
        raise SpftError(
            f"the {kind} weight of {name or 'a layer'} is sharded, so its values cannot be read; "
            "use `importance`: group_taylor, which needs none"
        )
    from bitsandbytes import functional

    if kind == "4-bit":
        return functional.dequantize_4bit(weight.data, weight.quant_state)
    # the scales move from the weight to the layer's state in the first forward
    scales = weight.SCB if getattr(weight, "SCB", None) is not None else layer.state.SCB
    return functional.int8_vectorwise_dequant(weight.data, scales)


def layout_of(layer: nn.Module) -> ShardLayout:
    """Which elements of a layer's dense weight each process holds, or works on."""
    if quantisation_of(layer) is None:
        return ShardLayout.of(layer.weight, isinstance(layer, Conv1D))
    return ShardLayout.replicated(layer.out_features, layer.in_features)

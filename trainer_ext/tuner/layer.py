"""SpftLinear: a linear layer of which only the selected output neurons are trained."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..distributed import ShardLayout, read_neurons, write_neurons
from ..errors import SpftError
from .functional import add_selected_outputs
from .trained import mark_trained


class NeuronDelta(nn.Module):
    """Trainable update of the selected neurons of one layer, for one adapter.

    Attributes:
        weight: (r, d_in), what is added to the selected rows; zero at the start.
        index: int64 (r,), the selected rows, ascending. Valid but meaningless until selected.
        selected: bool (), whether the index has been chosen. It is saved with the adapter.
    """

    def __init__(self, r: int, d_in: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(r, d_in))
        mark_trained(self.weight)
        self.register_buffer("index", torch.arange(r, dtype=torch.int64))
        self.register_buffer("selected", torch.tensor(False))
        self._read_selected: tuple[torch.Tensor | None, int, bool] = (None, -1, False)

    @property
    def is_selected(self) -> bool:
        """`selected` as a Python bool, read from the device only when the buffer has changed.

        Every loader fills buffers in its own way, so the buffer itself is what counts.
        """
        buffer, version, value = self._read_selected
        if buffer is not self.selected or version != self.selected._version:
            value = bool(self.selected)
            self._read_selected = (self.selected, self.selected._version, value)
        return value

    def forward(self, y: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """Add the update's outputs to the base layer's output y, in place; x is its input.

        A module's own forward, so that engines that shard `weight` gather it for this call.
        """
        return add_selected_outputs(y, x, self.weight, self.index)

    def select(self, index: torch.Tensor) -> None:
        """Fill in which neurons the rows of `weight` belong to.

        Raises:
            SpftError: the number of neurons differs from r, or they are not ascending and distinct.
        """
        if index.shape != self.index.shape:
            raise SpftError(
                f"a selection of {tuple(index.shape)} neurons does not fit an adapter with "
                f"r = {self.index.numel()}; select with the adapter's own r"
            )
        if bool((index.diff() <= 0).any()) or bool((index < 0).any()):
            raise SpftError("a selection must hold distinct neurons in ascending order")
        self.index.copy_(index)
        self.selected.fill_(True)


class SpftLinear(nn.Module, BaseTunerLayer):
    """Wraps `nn.Linear` or transformers' `Conv1D` (d_in -> d_out): W' = W + scatter(delta, index).

    The base weight and bias stay frozen. Several adapters may be active at once; their updates add.

    Attributes:
        calibrating: the forward serves to select neurons; an unselected adapter is no mistake then.
    """

    adapter_layer_names = ("spft_delta",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = linear_shape(self.get_base_layer(), name)
        self.is_conv1d = isinstance(self.get_base_layer(), Conv1D)
        self.spft_delta = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._rows_before_merge: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._configs: dict[str, object] = {}
        self.calibrating = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, name)

    def update_layer(self, adapter_name: str, config, name: str) -> None:
        """Add an adapter to this layer.

        An adapter with the very configuration of one that is here takes over its selection: TRL
        makes its reference copy this way, and copies parameters but no buffers.
        """
        delta = NeuronDelta(config.neurons_of(name, self.out_features), self.in_features)
        twin = next((n for n, c in self._configs.items() if c == config), None)
        if twin is not None and self.spft_delta[twin].is_selected:
            delta.select(self.spft_delta[twin].index.cpu())
        self.spft_delta[adapter_name] = delta
        self._configs[adapter_name] = config
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self._configs.pop(adapter_name, None)

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        y = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return y
        for adapter_name in self.active_adapters:
            if adapter_name not in self.spft_delta:
                continue
            delta = self.spft_delta[adapter_name]
            # A compiled graph must not depend on the flag: it may be filled in after compiling.
            # Adding an unselected adapter's zeros gives the same.
            if torch.compiler.is_compiling() or delta.is_selected:
                y = delta(y, x)
            elif (
                self.training
                and torch.is_grad_enabled()
                and delta.weight.requires_grad
                and not self.calibrating
            ):
                raise SpftError(
                    f"SPFT adapter {adapter_name!r} is being trained before its neurons are "
                    "selected; train with SpftTrainer or SpftCallback, or call "
                    "trainer_ext.select_neurons(model) first"
                )
            # Not selected and not trained: delta is zero, the layer is the base layer.
        return y

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write W + delta into the selected rows of the base weight, rounded to its dtype.

        The rows' old values are kept, so that `unmerge` restores them bit for bit.

        Raises:
            SpftError: with `safe_merge`, a merged row is not finite; the weight is left as it was.
        """
        for name in check_adapters_to_merge(self, adapter_names) or []:
            if name not in self.spft_delta:
                continue
            delta = self.spft_delta[name]
            old_rows = self.rows(delta.index).clone()
            new_rows = old_rows
            if delta.is_selected:
                new_rows = (old_rows.float() + delta.weight.detach().float()).to(old_rows.dtype)
            if safe_merge and not torch.isfinite(new_rows).all():
                raise SpftError(
                    f"adapter {name!r} has non-finite values and was not merged; "
                    "merge an earlier checkpoint"
                )
            self._write_rows(delta.index, new_rows)
            self._rows_before_merge[name] = (delta.index.clone(), old_rows)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Restore the base weight to its values before the merges, exactly."""
        while self.merged_adapters:
            # kept by themselves: the adapter may have been deleted since
            self._write_rows(*self._rows_before_merge.pop(self.merged_adapters.pop()))

    def shard_layout(self) -> ShardLayout:
        """Which elements of the base weight each process holds."""
        return ShardLayout.of(self.get_base_layer().weight, self.is_conv1d)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """The base weight of the neurons `index`, (len(index), d_in), in the base dtype.

        Under an engine that shards the weight, all processes must ask for the same.
        """
        return read_neurons(self.get_base_layer().weight, self.shard_layout(), index)

    def _write_rows(self, index: torch.Tensor, rows: torch.Tensor) -> None:
        write_neurons(self.get_base_layer().weight, self.shard_layout(), index, rows)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """The adapter's update as a dense tensor of the base weight's shape."""
        delta = self.spft_delta[adapter_name]
        dense = delta.weight.new_zeros(self.out_features, self.in_features)
        if delta.is_selected:
            dense.index_copy_(0, delta.index, delta.weight.detach())
        return dense.t() if self.is_conv1d else dense

    def __repr__(self) -> str:
        return "spft." + super().__repr__()


def is_linear(layer: nn.Module) -> bool:
    """Whether SPFT can train neurons of the layer."""
    return isinstance(layer, (nn.Linear, Conv1D))


_SUPPORTED_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def linear_shape(layer: nn.Module, name: str) -> tuple[int, int]:
    """(d_in, d_out) of a supported linear layer.

    Raises:
        SpftError: the layer is of another kind, or its weight is quantised.
    """
    if is_linear(layer):
        if layer.weight.dtype not in _SUPPORTED_DTYPES:
            raise SpftError(
                f"layer {name} is a {type(layer).__name__} with weights in "
                f"{str(layer.weight.dtype).removeprefix('torch.')}; quantised bases are not "
                "supported yet, so load the model in bf16, fp16 or fp32"
            )
        if isinstance(layer, Conv1D):
            return layer.nx, layer.nf
        return layer.in_features, layer.out_features
    raise SpftError(
        f"`target_modules` matches {name}, a {type(layer).__name__}; SPFT trains neurons of "
        "nn.Linear and transformers' Conv1D, so narrow `target_modules` or list it in "
        "`exclude_modules`"
    )

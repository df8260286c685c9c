"""SpftLinear: a linear layer of which only the selected output neurons are trained."""

from __future__ import annotations

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import nn
from transformers.pytorch_utils import Conv1D

from ..distributed.shards import ShardLayout, read_neurons, whole_in_forward, write_neurons
from ..errors import SpftError
from . import write_through
from .base_layers import (
    dense_weight,
    layout_of,
    linear_shape,
    prepare_quantised,
    quantisation_of,
)
from .delta import NeuronDelta
from .functional import overwrite_selected_outputs, track_selected_outputs


class SpftLinear(nn.Module, BaseTunerLayer):
    """Wraps `nn.Linear` or transformers' `Conv1D` (d_in -> d_out): W' = W + scatter(delta, index).

    The base weight and bias stay frozen; the weight may be quantised by bitsandbytes. Several
    adapters may be active at once; their updates add. An adapter with an anchor puts its neurons'
    anchor in W's place, also where adapters are disabled: they go back to where training started.

    Where one adapter trains and the base weight is whole, the selected rows of the weight itself
    hold W0 + delta (write-through): the forward is the plain layer's. With any other set of active
    adapters the written rows' outputs are replaced by W0's, so the weight need not change between
    a forward and its backward.

    Attributes:
        calibrating: the forward serves to select neurons; an unselected adapter is no mistake then.
        written: the rows of the base weight that hold an adapter's update, if any do.
        kept_in_file: W0's rows (index, rows) of a state dict that is being loaded.
        name: in the base model.
    """

    adapter_layer_names = ("spft_delta",)

    def __init__(self, base_layer: nn.Module, adapter_name: str, config, name: str) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.in_features, self.out_features = linear_shape(self.get_base_layer(), name)
        self.is_conv1d = isinstance(self.get_base_layer(), Conv1D)
        prepare_quantised(self.get_base_layer(), name)
        self.spft_delta = nn.ModuleDict()
        self.merged_adapters: list[str] = []
        self._rows_before_merge: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
        self._configs: dict[str, object] = {}
        self.calibrating = False
        self.written: write_through.WrittenRows | None = None
        self.kept_in_file: tuple[torch.Tensor, torch.Tensor] | None = None
        self.name = name
        self.register_load_state_dict_post_hook(write_through.settle_loaded)
        write_through.follow_steps(self)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, config, name)

    def update_layer(self, adapter_name: str, config, name: str) -> None:
        """Add an adapter to this layer, with the selection of the one that it is a copy of."""
        delta = NeuronDelta(
            config.neurons_of(name, self.out_features), self.in_features, self._anchor_dtype(config)
        )
        if config.copy_of is not None and self.spft_delta[config.copy_of].is_selected:
            copied = self.spft_delta[config.copy_of]
            delta.select(copied.index.cpu(), copied.anchor)
        self.spft_delta[adapter_name] = delta
        self._configs[adapter_name] = config
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def _anchor_dtype(self, config) -> torch.dtype | None:
        """Of an anchor that is yet to be filled in; None where the adapter has none."""
        if config.anchor in (None, "none"):
            return None
        base = self.get_base_layer()
        return torch.bfloat16 if quantisation_of(base) else base.weight.dtype

    def delete_adapter(self, adapter_name: str) -> None:
        if self.written is not None and self.written.adapter == adapter_name:
            write_through.end(self)
        super().delete_adapter(adapter_name)
        self._configs.pop(adapter_name, None)

    def get_base_layer(self) -> nn.Module:
        """As PEFT's, which looks for attributes that are not there: that costs in every forward."""
        base = self._modules["base_layer"]
        return base if type(base) in (nn.Linear, Conv1D) else super().get_base_layer()

    @property
    def base_weight(self) -> torch.Tensor:
        """The base layer's weight as this process holds it."""
        return self.get_base_layer()._parameters["weight"]

    def config_of(self, adapter_name: str):
        """The SpftConfig of an adapter."""
        return self._configs[adapter_name]

    def forward(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        delta = write_through.written_delta(self)
        if delta is not None:
            return self._tracked_output(delta, x, *args, **kwargs)
        deltas = self.spft_delta
        active = [name for name in self.active_adapters if name in deltas]
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self._start_output(active, x, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        if len(active) == 1 and write_through.holds_update(self, active[0], deltas[active[0]]):
            return self._tracked_output(deltas[active[0]], x, *args, **kwargs)
        y = self._base_output(x, *args, **kwargs)
        anchored = self._anchored(active)
        for adapter_name in sorted(active, key=lambda name: name != anchored):
            delta = deltas[adapter_name]
            # A compiled graph must not depend on the flag: it may be filled in after compiling.
            # Adding an unselected adapter's zeros gives the same.
            if torch.compiler.is_compiling() or delta.is_selected:
                y = delta(y, x, self._bias() if adapter_name == anchored else None)
            elif self.trains(delta):
                raise SpftError(
                    f"SPFT adapter {adapter_name!r} is being trained before its neurons are "
                    "selected; train with SpftTrainer or prepare_trainer, or call "
                    "trainer_ext.select_neurons(model) first"
                )
            # Not selected and not trained: delta is zero, the layer is the base layer.
        return y

    def _tracked_output(self, delta: NeuronDelta, x: torch.Tensor, *args, **kwargs):
        """The output where the base weight holds the update; delta gets its gradient from it."""
        y = self._modules["base_layer"](x, *args, **kwargs)
        weight = delta.held_weight
        if weight.requires_grad and torch.is_grad_enabled():
            y = track_selected_outputs(y, x, weight, delta.held_index)
        return y

    def trains(self, delta: NeuronDelta) -> bool:
        """Whether this forward is one of a training of the delta."""
        return (
            self.training
            and torch.is_grad_enabled()
            and delta.held_weight.requires_grad
            and not self.calibrating
        )

    def _anchored(self, active: list[str]) -> str | None:
        """The active adapter that has an anchor, if one does."""
        anchored = [name for name in active if self.spft_delta[name].anchor is not None]
        if len(anchored) > 1:
            raise SpftError(
                f"the adapters {', '.join(map(repr, anchored))} are active together, but each "
                "starts its neurons from values of its own; activate one of them"
            )
        return anchored[0] if anchored else None

    def _bias(self) -> torch.Tensor | None:
        return whole_in_forward(self, self.get_base_layer().bias)

    def _base_output(self, x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """The base layer's output by W0, whatever is written in its weight."""
        y = self.base_layer(x, *args, **kwargs)
        if self.written is None:
            return y
        bias = self.get_base_layer().bias
        return overwrite_selected_outputs(y, x, self.written.rows, self.written.index, bias)

    def _start_output(self, active: list[str], x: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        """The output before any update: the base layer's, or where the active adapter started."""
        anchored = self._anchored(active)
        if anchored is None:
            return self._base_output(x, *args, **kwargs)
        if self.written is not None and self.written.adapter == anchored:
            y = self.base_layer(x, *args, **kwargs)  # the same rows' outputs are replaced
        else:
            y = self._base_output(x, *args, **kwargs)
        return self.spft_delta[anchored].start(y, x, self._bias())

    def _apply(self, fn, recurse: bool = True):
        # The kept rows go where the weight goes. As a buffer, DDP would send them in every forward.
        super()._apply(fn, recurse)
        if self.written is not None:
            self.written = self.written.moved(fn)
        return self

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        write_through.keep_in_state_dict(self, destination, prefix)

    def _load_from_state_dict(self, state_dict, prefix, *args):
        write_through.take_from_state_dict(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write W + delta into the selected rows of the base weight, rounded to its dtype.

        The rows' old values are kept, so that `unmerge` restores them bit for bit.

        Raises:
            SpftError: with `safe_merge`, a merged row is not finite, the weight is left as it was;
                or the weight is quantised.
        """
        kind = quantisation_of(self.get_base_layer())
        if kind is not None:
            raise SpftError(
                f"the base weights are in {kind[0]} bits, to which merging would round the trained "
                "neurons again; merge into the original checkpoint: spft merge ADAPTER -o FOLDER, "
                "or trainer_ext.merge_checkpoint"
            )
        write_through.end(self)
        names = check_adapters_to_merge(self, adapter_names) or []
        names = [name for name in names if name in self.spft_delta]
        anchored = self._anchored([*self.merged_adapters, *names])
        if anchored in names and self.merged_adapters:
            raise SpftError(
                f"adapter {anchored!r} starts its neurons from values of its own, which would "
                f"replace what {self.merged_adapters[0]!r} has merged; merge {anchored!r} first"
            )
        for name in sorted(names, key=lambda name: name != anchored):
            delta = self.spft_delta[name]
            old_rows = self.rows(delta.index).clone()
            new_rows = old_rows
            if delta.is_selected:
                start = old_rows if delta.anchor is None else delta.anchor
                new_rows = (delta.weight.detach() + start).to(old_rows.dtype)
            if safe_merge and not torch.isfinite(new_rows).all():
                raise SpftError(
                    f"adapter {name!r} has non-finite values and was not merged; "
                    "merge an earlier checkpoint"
                )
            self.write_rows(delta.index, new_rows)
            self._rows_before_merge[name] = (delta.index.clone(), old_rows)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Restore the base weight to its values before the merges, exactly."""
        while self.merged_adapters:
            # kept by themselves: the adapter may have been deleted since
            self.write_rows(*self._rows_before_merge.pop(self.merged_adapters.pop()))

    def shard_layout(self) -> ShardLayout:
        """Which elements of the dense base weight each process holds."""
        return layout_of(self.get_base_layer())

    @property
    def has_dense_weight(self) -> bool:
        """Whether the base weight is stored as it is computed with."""
        return quantisation_of(self.get_base_layer()) is None

    def dense_weight(self) -> torch.Tensor:
        """The base weight as stored; a quantised one dequantised, (d_out, d_in)."""
        return dense_weight(self.get_base_layer(), self.name)

    def rows(self, index: torch.Tensor) -> torch.Tensor:
        """The base weight of the neurons `index`, (len(index), d_in), in the base dtype.

        Of a quantised weight, what it is dequantised to. Under an engine that shards the weight,
        all processes must ask for the same.
        """
        rows = read_neurons(self.dense_weight(), self.shard_layout(), index)
        if self.written is not None:
            kept, index = self.written.index, index.to(self.written.index.device)
            place = torch.searchsorted(kept, index).clamp(max=kept.numel() - 1)
            is_kept = (kept[place] == index)[:, None]
            rows = torch.where(is_kept, self.written.rows[place], rows)
        return rows

    def write_rows(self, index: torch.Tensor, rows: torch.Tensor) -> None:
        """Write (len(index), d_in) weights of the neurons `index` into the base weight."""
        write_neurons(self.get_base_layer().weight, self.shard_layout(), index, rows)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        return True

    def get_delta_weight(self, adapter_name: str) -> torch.Tensor:
        """What the adapter adds to the base weight, as a dense tensor of that weight's shape."""
        delta = self.spft_delta[adapter_name]
        dense = delta.weight.new_zeros(self.out_features, self.in_features)
        if delta.is_selected:
            change = delta.weight.detach()
            if delta.anchor is not None:
                before = self._rows_before_merge.get(adapter_name)
                rows = self.rows(delta.index) if before is None else before[1]
                change = change + (delta.anchor - rows)
            dense.index_copy_(0, delta.index, change.to(dense.dtype))
        return dense.t() if self.is_conv1d else dense

    def __repr__(self) -> str:
        return "spft." + super().__repr__()

"""How far a quantised base is from its original checkpoint, before and after an adapter."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from trainer_ext.errors import SpftError
from trainer_ext.files.base_checkpoint import BaseCheckpoint
from trainer_ext.tuner.base_layers import checkpoint_has_columns
from trainer_ext.tuner.model import spft_layers


@dataclass(frozen=True)
class QuantisationError:
    """Error of one layer's weight, or of several layers together.

    Attributes:
        weight_norm: ||W||, Frobenius, of the original weight.
        before: ||W - Q|| of the quantised weight Q.
        after: ||W - Q'|| of what the layer computes with, the adapter's part included.
        nuclear_reduction: 1 - ||W - Q'||_* / ||W - Q||_*, the share of the nuclear norm of the
            error that the adapter removes (the ratio that arXiv 2502.11439's code prints); over
            several layers the mean.
    """

    weight_norm: float
    before: float
    after: float
    nuclear_reduction: float

    @property
    def relative_before(self) -> float:
        return self.before / self.weight_norm

    @property
    def relative_after(self) -> float:
        return self.after / self.weight_norm

    @classmethod
    def of(
        cls, original: torch.Tensor, quantised: torch.Tensor, used: torch.Tensor
    ) -> QuantisationError:
        """Of one layer: the original weight, its quantised copy, and what is computed with."""
        original = original.float()
        first, last = original - quantised.float(), original - used.float()
        nuclear_before = torch.linalg.matrix_norm(first, "nuc").item()
        nuclear_after = torch.linalg.matrix_norm(last, "nuc").item()
        return cls(
            weight_norm=original.norm().item(),
            before=first.norm().item(),
            after=last.norm().item(),
            nuclear_reduction=1 - nuclear_after / nuclear_before if nuclear_before else 0.0,
        )

    @classmethod
    def together(cls, errors: Iterable[QuantisationError]) -> QuantisationError:
        """Of several layers, as of one weight that holds them all."""
        errors = list(errors)

        def norm(name: str) -> float:
            return math.sqrt(sum(getattr(error, name) ** 2 for error in errors))

        reduction = sum(error.nuclear_reduction for error in errors) / len(errors)
        return cls(norm("weight_norm"), norm("before"), norm("after"), reduction)


@torch.no_grad()
def quantisation_errors(
    model, adapter_name: str = "default", base: str | None = None
) -> dict[str, QuantisationError]:
    """Error of every layer of an adapter over a quantised base, by its name in the base model.

    Original weights are read from the checkpoint one layer at a time. Takes a singular value
    decomposition a layer, twice.

    Args:
        model: a PEFT model with an SPFT adapter.
        base: folder or hub name of the original checkpoint; by default the one that the model was
            loaded from.

    Raises:
        SpftError: the checkpoint cannot be read, or the base is not quantised.
    """
    checkpoint = BaseCheckpoint.find(base) if base else BaseCheckpoint.of(model)
    errors = {}
    for name, layer in spft_layers(model, adapter_name).items():
        if layer.has_dense_weight:
            raise SpftError(
                f"layer {name} is not quantised, so it has no quantisation error; load the model "
                "in 4 or 8 bits"
            )
        every = torch.arange(layer.out_features)
        quantised = layer.rows(every)
        columns = checkpoint_has_columns(layer.get_base_layer())
        original = checkpoint.rows(name, every, columns).to(quantised.device)
        change = layer.get_delta_weight(adapter_name)
        errors[name] = QuantisationError.of(original, quantised, quantised.float() + change.float())
    return errors

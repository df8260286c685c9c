"""SpftConfig: what an SPFT adapter is, as a PEFT configuration."""

from __future__ import annotations

import inspect
import textwrap
from dataclasses import dataclass, field, fields
from typing import Any

from peft import PeftConfig

from ..errors import SpftError
from .checks import (
    as_numbers,
    check_budget,
    check_choice,
    check_layer_pattern,
    check_pattern,
    check_positive_int,
    check_positive_number,
    check_share,
    matches_layer,
)
from .peft_type import SPFT
from .registry import METRICS

DEFAULT_R = 64
AXES = ("rows",)
FORWARDS = ("auto", "delta", "write_through")
ALLOCATIONS = ("uniform", "global")
QUANT_INITS = ("exact", "none")
ANCHORS = ("none", "checkpoint", "adapter")
PATTERNS = ("r_pattern", "density_pattern")


def option(default: Any, help: str, default_text: str = "") -> Any:
    """A field with a help text; every table and help page of the options is made of these.

    Args:
        default_text: the default in words, where the value does not say it.
    """
    return field(default=default, metadata={"help": help, "default": default_text})


@dataclass
class SpftConfig(PeftConfig):
    """Configuration of structured-pruning-based sparse fine-tuning (arXiv 2502.11439).

    In every targeted linear layer, `r` output neurons (rows of the weight) are selected by an
    importance metric and only their weights are trained. The fields are the YAML keys of the
    Axolotl plugin without their `spft_` prefix.

    Raises:
        SpftError: a field's value is not allowed, or `r` and `density` are both given.
    """

    r: int | None = option(
        None,
        "neurons trained in each layer; all of a smaller layer",
        f"{DEFAULT_R}",
    )
    density: float | None = option(
        None, "share of each layer's neurons instead of `r`, in (0, 1]; at least one neuron"
    )
    importance: str = option("group_taylor", "the importance metric; docs/importance.md has all")
    calibration_batches: int = option(
        8, "optimizer steps' worth of data that the metric is averaged over"
    )
    importance_file: str | None = option(
        None, "scores of an earlier run to select by, instead of calibrating"
    )
    allocation: str = option(
        "uniform",
        "`global`: the same number of parameters in all, spread over the layers by the scores in "
        "`importance_file`",
    )
    allocation_floor: float = option(
        0.25, "least share of its uniform number of neurons that `global` leaves a layer"
    )
    allocation_ceiling: float = option(
        4.0, "largest multiple of its uniform number that `global` gives a layer"
    )
    r_pattern: dict[str, int] | None = option(
        None,
        "neurons of single layers: name ending or regular expression, and number; the first that "
        "matches counts",
    )
    density_pattern: dict[str, float] | None = option(
        None, "the same with shares of the layer's neurons"
    )
    class_field: str | None = option(None, "dataset column with the classes of `quantile_mean`")
    zo_eps: float = option(1e-3, "size of `zo_taylor`'s perturbations, in units of the weights")
    zo_directions: int = option(5, "random directions of `zo_taylor` for each batch")
    accumulator_memory: float | None = option(
        None,
        "GiB on each process for `taylor`'s accumulators; what does not fit takes further passes "
        "over the batches",
        "no limit",
    )
    accumulator_offload: bool = option(False, "keep `taylor`'s accumulators in CPU memory")
    stability: bool = option(
        True, "report how far the selections by two halves of the calibration data agree"
    )
    axis: str = option("rows", "what a neuron is: an output neuron with its input weights")
    forward: str = option(
        "auto",
        "`write_through` keeps W + delta in the weight's own rows while training, `delta` adds the "
        "outputs; `auto` writes through wherever a process holds the whole, unquantised weight",
    )
    quant_init: str | None = option(
        None,
        "over a 4- or 8-bit base: `exact` starts the trained neurons from the checkpoint's "
        "original rows, `none` from the quantised ones",
        "exact",
    )
    target_modules: list[str] | str | None = option(
        None,
        "layers to train: names, or a regular expression",
        "all linear layers but head, routers, vision",
    )
    exclude_modules: list[str] | str | None = option(
        None, "layers to leave out: names, or a regular expression"
    )
    seed: int = option(42, "seed of `random`'s scores and `zo_taylor`'s noise")
    layers_to_transform: list[int] | int | None = option(
        None, "indices of the transformer blocks to train", "all"
    )
    layers_pattern: list[str] | str | None = option(
        None, "name of the block list that `layers_to_transform` counts in"
    )
    modules_to_save: list[str] | None = option(
        None, "modules trained and saved whole beside the selected neurons"
    )
    start_adapter: str | None = option(
        None,
        "folder of an SPFT adapter that training starts from: its neurons are trained on, and its "
        "values are what delta starts from and what switching it off leaves",
    )
    allocated: dict[str, int] | None = option(
        None, "neurons of each layer that `global` came to; filled in, not given"
    )
    anchor: str | None = option(
        None,
        "what the deltas are added to: `none` (the base's own rows), `checkpoint` (`quant_init` is "
        "exact) or `adapter` (`start_adapter`); filled in, not given",
    )

    # Adapter in the same model whose copy this one is; no field, so it is not saved.
    copy_of = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = SPFT
        # JSON has no sets, and a saved config must equal the one it came from.
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, (set, tuple)):
                setattr(self, name, sorted(value))
            check_pattern(name, value)
        check_budget(self.r, self.density)
        check_choice("importance", self.importance, METRICS)
        check_choice("axis", self.axis, AXES)
        check_choice("forward", self.forward, FORWARDS)
        if self.quant_init is not None:
            check_choice("quant_init", self.quant_init, QUANT_INITS)
        if self.anchor is not None:
            check_choice("anchor", self.anchor, ANCHORS)
        self._check_allocation()
        check_positive_int("calibration_batches", self.calibration_batches)
        check_positive_int("zo_directions", self.zo_directions)
        check_positive_number("zo_eps", self.zo_eps)
        if self.accumulator_memory is not None:
            check_positive_number("accumulator_memory", self.accumulator_memory)
        needs_classes = METRICS[self.importance].needs_classes
        if needs_classes and not (self.class_field or self.importance_file):
            raise SpftError(
                f"`importance` is {self.importance!r} but `class_field` is not set; name the "
                "dataset column that holds each row's class"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise SpftError(
                f"`layers_pattern` is {self.layers_pattern!r} but `layers_to_transform` is not "
                "set; set it to the block indices to train, or drop `layers_pattern`"
            )

    def _check_allocation(self) -> None:
        for key, check in (
            ("r_pattern", check_positive_int),
            ("density_pattern", check_share),
            ("allocated", check_positive_int),
        ):
            setattr(self, key, as_numbers(key, getattr(self, key), check))
        for key in PATTERNS:
            for pattern in getattr(self, key) or ():
                check_layer_pattern(key, pattern)
        check_choice("allocation", self.allocation, ALLOCATIONS)
        check_share("allocation_floor", self.allocation_floor)
        check_positive_number("allocation_ceiling", self.allocation_ceiling)
        if self.allocation_ceiling < 1:
            raise SpftError(
                f"`allocation_ceiling` is {self.allocation_ceiling}; allowed is a multiple of the "
                "uniform number of neurons, at least 1"
            )
        if self.allocation == "uniform" and self.allocated is not None:
            raise SpftError(
                "`allocated` is filled in but `allocation` is 'uniform'; leave `allocated` out"
            )
        if self.allocation == "global" and not self.importance_file and self.allocated is None:
            raise SpftError(
                "`allocation` is 'global' but `importance_file` is not set, and the numbers of "
                "neurons must be known before training; make a file by `spft calibrate CONFIG -o "
                "scores.safetensors` and set `importance_file` to it"
            )

    def to_dict(self) -> dict:
        """As PEFT's, with patterns as pairs: PEFT sorts the keys of what it writes as JSON, but of
        several patterns that match the first counts."""
        fields = super().to_dict()
        for key in PATTERNS:
            if fields[key] is not None:
                fields[key] = [list(pair) for pair in fields[key].items()]
        return fields

    def neurons_of(self, layer: str, out_features: int) -> int:
        """Number of neurons to train in a layer with `out_features` neurons.

        Args:
            layer: its name in the base model.

        Raises:
            SpftError: `r_pattern` gives it more than it has, `r_pattern` and `density_pattern` both
                match it, or `allocated` lacks it.
        """
        matching = self.pattern_of(layer)
        if matching is not None:
            key, pattern = matching
            if key == "density_pattern":
                return share_of(self.density_pattern[pattern], out_features)
            count = self.r_pattern[pattern]
            if count > out_features:
                raise SpftError(
                    f"`r_pattern` gives layer {layer} {count} neurons by {pattern!r} but it has "
                    f"{out_features}; lower the number to at most {out_features}, or use "
                    "`density_pattern`"
                )
            return count
        if self.allocation == "uniform":
            return self.uniform_neurons_of(out_features)
        count = (self.allocated or {}).get(layer)
        if count is None or count > out_features:
            raise SpftError(
                f"`allocated` has {count or 'no'} neurons for layer {layer} of {out_features}; it "
                "was filled in for another model or other `target_modules`, so use a fresh "
                "SpftConfig"
            )
        return count

    def uniform_neurons_of(self, out_features: int) -> int:
        """The number that `r` or `density` gives a layer, without patterns and `allocation`."""
        if self.density is not None:
            return share_of(self.density, out_features)
        return min(self.r or DEFAULT_R, out_features)

    def pattern_of(self, layer: str) -> tuple[str, str] | None:
        """Field and key of the pattern that sets a layer's number; None if no pattern matches.

        Raises:
            SpftError: `r_pattern` and `density_pattern` both match the layer.
        """
        matching = []
        for key in PATTERNS:
            patterns = getattr(self, key) or ()
            first = next((p for p in patterns if matches_layer(p, layer)), None)
            if first is not None:
                matching.append((key, first))
        if len(matching) > 1:
            raise SpftError(
                f"layer {layer} matches {matching[0][1]!r} in `r_pattern` and {matching[1][1]!r} "
                "in `density_pattern`; keep one of them"
            )
        return matching[0] if matching else None


def share_of(share: float, out_features: int) -> int:
    """The number of neurons nearest to a share of a layer, at least one."""
    return max(1, int(share * out_features + 0.5))


def own_options() -> list:
    """The dataclass fields of SpftConfig that are not PEFT's, in the order of the class."""
    return [f for f in fields(SpftConfig) if "default" in f.metadata]


def default_in_words(option) -> str:
    """A field's default as tables show it; empty for None."""
    value = option.metadata["default"] or option.default
    return "" if value is None else str(value)


def _described(options) -> str:
    lines = []
    for o in options:
        default = default_in_words(o)
        text = f"{o.name}: {o.metadata['help']}" + (f" (default: {default})" if default else "")
        lines.append(textwrap.fill(text, 96, initial_indent="    ", subsequent_indent="        "))
    return "Args:\n" + "\n".join(lines)


if SpftConfig.__doc__:  # python -OO leaves none
    SpftConfig.__doc__ = f"{inspect.cleandoc(SpftConfig.__doc__)}\n\n{_described(own_options())}\n"

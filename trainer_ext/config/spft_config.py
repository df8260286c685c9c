"""SpftConfig: what an SPFT adapter is, as a PEFT configuration."""

from __future__ import annotations

from dataclasses import dataclass, field

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
from .peft_type import add_peft_type

DEFAULT_R = 64
METRICS = (
    "magnitude",
    "taylor",
    "group_taylor",
    "zo_taylor",
    "quantile_mean",
    "wanda",
    "random",
)
AXES = ("rows",)
FORWARDS = ("auto", "delta", "write_through")
ALLOCATIONS = ("uniform", "global")
QUANT_INITS = ("exact", "none")
ANCHORS = ("none", "checkpoint", "adapter")
PATTERNS = ("r_pattern", "density_pattern")


@dataclass
class SpftConfig(PeftConfig):
    """Configuration of structured-pruning-based sparse fine-tuning (arXiv 2502.11439).

    In every targeted linear layer, `r` output neurons (rows of the weight) are selected by an
    importance metric and only their weights are trained. The fields are the YAML keys of the
    Axolotl plugin without their `spft_` prefix.

    Raises:
        SpftError: a field's value is not allowed, or `r` and `density` are both given.
    """

    r: int | None = field(
        default=None,
        metadata={
            "help": f"Neurons to train in each layer, at least 1. Default {DEFAULT_R}, or all "
            "neurons of a smaller layer."
        },
    )
    density: float | None = field(
        default=None,
        metadata={
            "help": "Share of each layer's neurons to train, in (0, 1], instead of `r`; rounded to "
            "the nearest number of neurons, at least one."
        },
    )
    importance: str = field(
        default="group_taylor",
        metadata={"help": f"Importance metric: one of {', '.join(METRICS)}."},
    )
    calibration_batches: int = field(
        default=8,
        metadata={
            "help": "Batches over which a data-driven metric is averaged. One batch is the data of "
            "one optimizer step: all accumulation steps on all processes."
        },
    )
    importance_file: str | None = field(
        default=None,
        metadata={
            "help": "Scores of an earlier calibration (spft_importance.safetensors): select by "
            "them instead of calibrating."
        },
    )
    class_field: str | None = field(
        default=None,
        metadata={"help": "Dataset column that holds the classes of `quantile_mean`."},
    )
    zo_eps: float = field(
        default=1e-3,
        metadata={"help": "Size of `zo_taylor`'s perturbations, in units of the weights."},
    )
    zo_directions: int = field(
        default=5,
        metadata={"help": "Random directions of `zo_taylor` for each calibration batch."},
    )
    accumulator_memory: float | None = field(
        default=None,
        metadata={
            "help": "Memory for `taylor`'s gradient accumulators on each process, in GiB; what "
            "does not fit is accumulated in further passes over the batches. None: one pass."
        },
    )
    accumulator_offload: bool = field(
        default=False, metadata={"help": "Keep `taylor`'s gradient accumulators in CPU memory."}
    )
    stability: bool = field(
        default=True,
        metadata={
            "help": "Score two halves of the calibration data as well and report how far their "
            "selections agree."
        },
    )
    allocation: str = field(
        default="uniform",
        metadata={
            "help": "`uniform`: `r` or `density` in every layer. `global`: as many parameters in "
            "all, spread over the layers by their scores in `importance_file`."
        },
    )
    allocation_floor: float = field(
        default=0.25,
        metadata={"help": "Least share of its uniform number that `global` leaves a layer."},
    )
    allocation_ceiling: float = field(
        default=4.0,
        metadata={"help": "Largest multiple of its uniform number that `global` gives a layer."},
    )
    r_pattern: dict[str, int] | None = field(
        default=None,
        metadata={
            "help": "Neurons of single layers: name ending or regular expression -> number. The "
            "first that matches counts."
        },
    )
    density_pattern: dict[str, float] | None = field(
        default=None,
        metadata={"help": "As `r_pattern`, with shares of the layer's neurons."},
    )
    allocated: dict[str, int] | None = field(
        default=None,
        metadata={"help": "Neurons of each layer that `global` came to; filled in, not given."},
    )
    axis: str = field(
        default="rows",
        metadata={"help": "What a neuron is: `rows`, an output neuron with its input weights."},
    )
    forward: str = field(
        default="auto",
        metadata={
            "help": "How training computes: `delta` adds the update's outputs to the base layer's; "
            "`write_through` keeps W0 + delta in the base weight's selected rows, and is refused "
            "where a weight is not whole; `auto` does so where it is, else `delta`."
        },
    )
    quant_init: str | None = field(
        default=None,
        metadata={
            "help": "How the neurons of a 4- or 8-bit base start: `exact` (the default there) from "
            "the original 16-bit rows, read from the checkpoint; `none` from the quantised ones."
        },
    )
    start_adapter: str | None = field(
        default=None,
        metadata={
            "help": "Folder of an SPFT adapter that training starts from: its neurons are trained "
            "on, and its values are what `delta` starts from and what switching it off leaves."
        },
    )
    anchor: str | None = field(
        default=None,
        metadata={
            "help": "What the deltas are added to: `none` (the base's own rows), `checkpoint` "
            "(`quant_init: exact`) or `adapter` (`start_adapter`); filled in, not given."
        },
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={
            "help": "Layers to train: names, a regular expression, or None for every linear layer "
            "of the language model but the head, routers and vision towers."
        },
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or a regular expression of layers to leave out."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the transformer blocks to train; None: all."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None,
        metadata={"help": "Name of the block list that `layers_to_transform` counts in."},
    )
    modules_to_save: list[str] | None = field(
        default=None,
        metadata={"help": "Modules trained and saved whole beside the selected neurons."},
    )
    seed: int = field(
        default=42, metadata={"help": "Seed of `random`'s scores and of `zo_taylor`'s noise."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = add_peft_type("SPFT")
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
        if self.importance == "quantile_mean" and not (self.class_field or self.importance_file):
            raise SpftError(
                "`importance` is 'quantile_mean' but `class_field` is not set; name the dataset "
                "column that holds each row's class"
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
            SpftError: the number is larger than the layer, `r_pattern` and `density_pattern` both
                match the layer, or `allocated` lacks it.
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
            return self.uniform_neurons_of(layer, out_features)
        count = (self.allocated or {}).get(layer)
        if count is None or count > out_features:
            raise SpftError(
                f"`allocated` has {count or 'no'} neurons for layer {layer} of {out_features}; it "
                "was filled in for another model or other `target_modules`, so use a fresh "
                "SpftConfig"
            )
        return count

    def uniform_neurons_of(self, layer: str, out_features: int) -> int:
        """The number that `r` or `density` gives a layer, whatever patterns and `allocation` say.

        Raises:
            SpftError: `r` is larger than the layer.
        """
        if self.density is not None:
            return share_of(self.density, out_features)
        if self.r is None:
            return min(DEFAULT_R, out_features)
        if self.r > out_features:
            raise SpftError(
                f"`r` is {self.r} but layer {layer} has {out_features} neurons; lower `r` to at "
                f"most {out_features}, use `density`, or list the layer in `exclude_modules`"
            )
        return self.r

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

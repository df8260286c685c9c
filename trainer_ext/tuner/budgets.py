"""How many neurons each layer gets, settled before the layers are made."""

from __future__ import annotations

import logging

from torch import nn

from ..config.checks import matches_layer
from ..config.spft_config import PATTERNS
from ..errors import SpftError
from ..ranking.allocation import allocate
from ..ranking.scores import ImportanceScores
from .targets import targeted_shapes

logger = logging.getLogger(__name__)


def settle_budgets(model: nn.Module, config) -> None:
    """Check the patterns against the layers, and fill in `allocated` where it is asked for.

    With `allocation: global` the scores in `importance_file` are read here and never again for
    this purpose: the result is saved with the configuration.

    Args:
        config: an SpftConfig whose `target_modules` are not None.

    Raises:
        SpftError: a pattern matches no targeted layer, or the scores are not those of exactly the
            targeted layers, or not finite.
    """
    patterned = any(getattr(config, key) for key in PATTERNS)
    if config.r is None and config.allocation == "uniform" and not patterned:
        return
    shapes = targeted_shapes(model, config)
    _warn_of_whole_layers(config, shapes)
    _refuse_idle_pattern(config, shapes)
    if config.allocation == "uniform" or config.allocated is not None:
        return
    scores = ImportanceScores.load_for(
        config.importance_file, {name: d_out for name, (_, d_out) in shapes.items()}
    )
    competing = {n: shape for n, shape in shapes.items() if config.pattern_of(n) is None}
    uniform = {n: config.uniform_neurons_of(d_out) for n, (_, d_out) in competing.items()}
    d_in = {name: inputs for name, (inputs, _) in competing.items()}
    try:
        config.allocated = allocate(
            scores.scores, d_in, uniform, config.allocation_floor, config.allocation_ceiling
        )
    except SpftError as error:
        raise error.within(f"`importance_file` is {config.importance_file!r}") from None
    logger.info(
        "%d neurons allocated to %d layers by %s",
        sum(config.allocated.values()),
        len(config.allocated),
        config.importance_file,
    )


def _warn_of_whole_layers(config, shapes: dict[str, tuple[int, int]]) -> None:
    """Once, for a fresh adapter: a loaded one has said so, and so has the original of a copy."""
    if config.r is None or config.anchor is not None or config.allocation != "uniform":
        return
    small = [
        name
        for name, (_, d_out) in shapes.items()
        if config.r > d_out and config.pattern_of(name) is None
    ]
    if small:
        logger.warning(
            "r is %d, and %d of %d targeted layers have fewer neurons, first %s: all of theirs are "
            "trained",
            config.r,
            len(small),
            len(shapes),
            small[0],
        )


def _refuse_idle_pattern(config, layers: dict[str, tuple[int, int]]) -> None:
    for key in PATTERNS:
        for pattern in getattr(config, key) or ():
            if not any(matches_layer(pattern, layer) for layer in layers):
                endings = sorted({layer.rpartition(".")[2] for layer in layers})
                raise SpftError(
                    f"`{key}` has {pattern!r}, which matches no targeted layer; name endings of "
                    f"layers, such as {', '.join(endings[:8])}"
                )

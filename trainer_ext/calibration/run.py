"""Runs calibration batches through a model and turns importance scores into a selection."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import nn

from ..config.registry import METRICS
from ..config.spft_config import SpftConfig
from ..distributed.engines import release_gathered_weights
from ..errors import SpftError, in_plain_words
from ..importance.base import CalibrationBatch, ImportanceMetric
from ..importance.class_column import RowClasses, hide_classes
from ..ranking.scores import ImportanceScores, check_same_layers
from ..ranking.selection import NeuronSelection, select_top
from ..ranking.stability import Stability, measure_stability
from ..tuner.model import adapter_config, layer_sizes, restore_base, spft_layers
from ..tuner.selecting import apply_selection
from ..versions import package_versions
from .fingerprints import check_same_model, model_fingerprint
from .mode import calibration_mode

logger = logging.getLogger(__name__)

Batch = Mapping | CalibrationBatch | Callable[[bool], torch.Tensor]
Loss = Callable[[nn.Module, dict], torch.Tensor]


def measure_importance(
    model: nn.Module,
    batches: Iterable[Batch] = (),
    adapter_name: str = "default",
    on_batch: Callable[[], None] = lambda: None,
    loss: Loss | None = None,
) -> ImportanceScores:
    """Score every neuron of the adapter's layers by the metric of its configuration.

    The model is left as it was: mode, random states, gradients and requires_grad flags.

    Args:
        model: a PEFT model with an SPFT adapter, without the wrapper of an engine.
        batches: for metrics that need data: model inputs, one dict an optimizer step; or objects
            with the methods of `CalibrationBatch`, or its `run` alone, for losses of another form.
            For quantile_mean, dicts have the rows' class ids under `CLASS_KEY`, which the model
            never gets to see.
        on_batch: called after each batch of each pass.
        loss: loss of the model on a dict; default `model(**batch).loss`.

    Raises:
        SpftError: the metric needs data and there was none.
    """
    config = adapter_config(model, adapter_name)
    layers = spft_layers(model, adapter_name)
    restore_base(model)  # another adapter may have trained before
    metric = METRICS[config.importance](layers, config, model)
    started = time.perf_counter()
    count = 0
    if metric.needs_data:
        passes = metric.passes()
        if len(passes) > 1:
            batches = list(batches)
        with (
            calibration_mode(model, layers, metric.needs_gradients),
            RowClasses.installed(model) as metric.row_classes,
        ):
            for names in passes:
                metric.begin_pass(names)
                with metric.attached(names):
                    for batch in batches:
                        metric.observe(_as_calibration_batch(batch, model, loss))
                        on_batch()
                release_gathered_weights(model)
                metric.end_pass()
        count = sum(metric.batches)
        if not count:
            raise SpftError(
                f"`importance` {config.importance!r} needs data but there was no batch; "
                "give batches, or use `importance`: magnitude"
            )
    scores = metric.scores()
    stability = _stability(metric, config) if count > 1 else None
    silent = metric.silent_layers() if count else []
    return ImportanceScores(
        scores=scores,
        metric=config.importance,
        batches=count,
        seconds=time.perf_counter() - started,
        silent_layers=silent,
        stability=stability,
        diagnostics=metric.diagnostics() if count else {},
        warnings=_warnings(metric, stability, silent) if count else [],
        metadata={
            "model": model_fingerprint(model, layers),
            "seed": str(config.seed),
            "versions": json.dumps(package_versions()),
        },
    )


def _stability(metric: ImportanceMetric, config: SpftConfig) -> Stability | None:
    if metric.parts == 1:
        return None
    neurons = {n: config.neurons_of(n, layer.out_features) for n, layer in metric.layers.items()}
    first, second = metric.scores([0]), metric.scores([1])
    return measure_stability(first, second, neurons, sum(metric.batches))


def _warnings(metric: ImportanceMetric, stability: Stability | None, silent: list[str]):
    found = metric.warnings()
    if stability is not None and stability.warning():
        found.append(stability.warning())
    if silent:
        found.append(
            f"the calibration data never reached {len(silent)} of the targeted layers, first "
            f"{silent[0]}; their neurons are chosen by position. Exclude them, or calibrate on "
            "more data"
        )
    return found


def select_by_scores(
    model: nn.Module, scores: ImportanceScores, adapter_name: str = "default"
) -> NeuronSelection:
    """Select the highest-scoring neurons and fill them into the adapter.

    Raises:
        SpftError: the scores are not those of the adapter's layers, or not finite.
    """
    config = adapter_config(model, adapter_name)
    sizes = layer_sizes(model, adapter_name)
    check_same_layers("the importance scores", scores.out_features, "the adapter", sizes)
    neurons = {name: config.neurons_of(name, size) for name, size in sizes.items()}
    selection = select_top(scores.scores, neurons)
    apply_selection(model, selection, adapter_name)
    return selection


def load_scores(
    path: str | os.PathLike, model: nn.Module, adapter_name: str = "default"
) -> ImportanceScores:
    """Read the scores of an earlier calibration for an adapter's layers.

    Raises:
        SpftError: the file is missing, damaged, of another kind, or made for other layers or for
            another model.
    """
    scores = ImportanceScores.load_for(path, layer_sizes(model, adapter_name))
    if "model" in scores.metadata:
        restore_base(model)
        here = model_fingerprint(model, spft_layers(model, adapter_name))
        try:
            check_same_model(scores.metadata["model"], here)
        except SpftError as error:
            raise error.within(f"`importance_file` is {str(path)!r}") from None
    metric = adapter_config(model, adapter_name).importance
    if scores.metric != metric:
        logger.warning(
            "importance_file %s holds %s scores although importance is %s; its scores are used",
            path,
            scores.metric,
            metric,
        )
    return scores


def select_neurons(
    model: nn.Module,
    batches: Iterable[Batch] = (),
    loss: Loss | None = None,
    adapter_name: str = "default",
) -> NeuronSelection:
    """Select an adapter's neurons in one call, for training loops of your own.

    Args:
        model: a PEFT model with a fresh SPFT adapter.
        batches, loss: see `measure_importance`. Class ids are hidden from the model in training,
            too.

    Raises:
        SpftError: the metric needs data and `batches` is empty, or a score is not finite.
    """
    config = adapter_config(model, adapter_name)
    if METRICS[config.importance].needs_classes:
        hide_classes(model)
    if config.importance_file:
        scores = load_scores(config.importance_file, model, adapter_name)
    else:
        scores = measure_importance(model, batches, adapter_name, loss=loss)
        for warning in scores.warnings:
            logger.warning("%s", in_plain_words(warning))
    return select_by_scores(model, scores, adapter_name)


def _as_calibration_batch(batch: Batch, model: nn.Module, loss: Loss | None) -> CalibrationBatch:
    if isinstance(batch, Mapping):

        def run(backward: bool) -> torch.Tensor:
            value = model(**batch).loss if loss is None else loss(model, dict(batch))
            if backward:
                value.backward()
            return value.detach()

        return CalibrationBatch(run, [batch])
    return batch if hasattr(batch, "run") else CalibrationBatch(batch)

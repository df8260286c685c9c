"""Runs calibration batches through a model and turns importance scores into a selection."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn

from .class_column import RowClasses, hide_classes
from .config import SpftConfig
from .distributed import release_gathered_weights
from .errors import SpftError
from .importance import METRIC_CLASSES
from .importance.base import ImportanceMetric, RunBatch
from .provenance import check_same_model, model_fingerprint, package_versions
from .scores import ImportanceScores, check_same_layers
from .selection import NeuronSelection, apply_selection, select_top
from .stability import Stability, measure_stability
from .tuner.model import adapter_config, layer_sizes, spft_layers

logger = logging.getLogger(__name__)

# Attributes that make a forward in train mode random: every kind of dropout, NEFTune's noise,
# the jitter of routers.
_RANDOM_FORWARD = re.compile(r"drop|neftune_noise_alpha|jitter_noise")


def measure_importance(
    model: nn.Module,
    batches: Iterable[RunBatch] = (),
    adapter_name: str = "default",
    on_batch: Callable[[], None] = lambda: None,
) -> ImportanceScores:
    """Score every neuron of the adapter's layers by the metric of its configuration.

    The model is left as it was: mode, random states, gradients and requires_grad flags.

    Args:
        model: a PEFT model with an SPFT adapter, without the wrapper of an engine.
        batches: for metrics that need data, one callable a batch: it runs the loss of one optimizer
            step's data, with True also the backward, and returns the loss.
        on_batch: called after each batch of each pass.

    Raises:
        SpftError: the metric needs data and there was none.
    """
    config = adapter_config(model, adapter_name)
    layers = spft_layers(model, adapter_name)
    metric = METRIC_CLASSES[config.importance](layers, config, model)
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
                    for run_batch in batches:
                        metric.observe(run_batch)
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
    batches: Iterable[dict] = (),
    loss: Callable[[nn.Module, dict], torch.Tensor] | None = None,
    adapter_name: str = "default",
) -> NeuronSelection:
    """Select an adapter's neurons in one call, for training loops of your own.

    Args:
        model: a PEFT model with a fresh SPFT adapter.
        batches: for metrics that need data: model inputs, one dict a batch. For quantile_mean
            with the rows' class ids under `CLASS_KEY`, which the model never gets to see, neither
            now nor in training.
        loss: loss of the model on a batch; default `model(**batch).loss`.

    Raises:
        SpftError: the metric needs data and `batches` is empty, or a score is not finite.
    """
    loss = loss or (lambda model, batch: model(**batch).loss)

    def run(batch: dict) -> RunBatch:
        def run_batch(backward: bool) -> torch.Tensor:
            value = loss(model, dict(batch))
            if backward:
                value.backward()
            return value.detach()

        return run_batch

    config = adapter_config(model, adapter_name)
    if config.importance == "quantile_mean":
        hide_classes(model)
    if config.importance_file:
        scores = load_scores(config.importance_file, model, adapter_name)
    else:
        scores = measure_importance(model, (run(b) for b in batches), adapter_name)
    return select_by_scores(model, scores, adapter_name)


@contextmanager
def calibration_mode(model: nn.Module, layers: dict, gradients: bool = True):
    """Train mode without randomness and without trainable parameters, undone on exit.

    Train mode because activation checkpointing is off in eval mode. Without `gradients` nothing
    requires a gradient, so forwards keep no activations; checkpointing, whose reentrant form runs
    without grad mode as a reference model does, is off then. What the loss itself flips
    (DPO's reference forward switches requires_grad back on) is restored too.
    """
    modules = list(model.modules())
    training = [module.training for module in modules]
    requires_grad = [(p, p.requires_grad) for p in model.parameters()]
    random_state = _random_state()
    silenced: list[tuple[object, str, float | bool]] = []
    embedding_hook = None
    try:
        _silence(modules, silenced)
        if gradients:
            embedding_hook = _require_input_grads(model)
        else:
            _stop_checkpointing(modules, silenced)
        model.train()
        for module in modules:
            if isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()  # its running statistics are part of the model
        for parameter, _ in requires_grad:
            parameter.requires_grad_(False)
        for layer in layers.values():
            layer.calibrating = True
        yield
    finally:
        for layer in layers.values():
            layer.calibrating = False
        if embedding_hook is not None:
            embedding_hook.remove()
        for owner, name, value in silenced:
            setattr(owner, name, value)
        for parameter, flag in requires_grad:
            parameter.requires_grad_(flag)
        for module, mode in zip(modules, training, strict=True):
            module.training = mode
        _restore_random_state(random_state)


def _silence(modules: list[nn.Module], silenced: list[tuple[object, str, float]]) -> None:
    """Set everything that makes a forward random to zero; notes what to set back in `silenced`."""
    configs = {id(c): c for m in modules if hasattr(c := getattr(m, "config", None), "__dict__")}
    for owner in [*modules, *configs.values()]:
        names = [n for n in vars(owner) if _RANDOM_FORWARD.search(n)]
        if isinstance(owner, nn.modules.dropout._DropoutNd):
            names.append("p")
        for name in names:
            value = getattr(owner, name)
            if isinstance(value, (int, float)) and not isinstance(value, bool) and value:
                silenced.append((owner, name, value))
                setattr(owner, name, 0.0)


def _stop_checkpointing(modules: list[nn.Module], stopped: list) -> None:
    for module in modules:
        if getattr(module, "gradient_checkpointing", False) is True:
            stopped.append((module, "gradient_checkpointing", True))
            module.gradient_checkpointing = False


def _require_input_grads(model: nn.Module):
    """Let the embeddings' output require a gradient: reentrant checkpointing drops the graph of
    blocks whose input does not."""
    embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
    if embeddings is None:
        return None

    def hook(module, inputs, output):
        if torch.is_grad_enabled() and output.is_floating_point() and output.is_leaf:
            output.requires_grad_(True)

    return embeddings.register_forward_hook(hook)


def _random_state() -> tuple:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    return random.getstate(), np.random.get_state(), torch.get_rng_state(), cuda


def _restore_random_state(state: tuple) -> None:
    python, numpy, cpu, cuda = state
    random.setstate(python)
    np.random.set_state(numpy)
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state_all(cuda)

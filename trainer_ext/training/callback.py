"""The callback that carries an SPFT run."""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from dataclasses import replace
from pathlib import Path

from peft import PeftModel
from tqdm.auto import tqdm
from transformers import Trainer, TrainerCallback

from ..calibration.batches import first_batches, may_be_one_shot, untouched
from ..calibration.fingerprints import DataFingerprint
from ..calibration.run import load_scores, measure_importance, select_by_scores
from ..config.registry import METRICS
from ..config.spft_config import SpftConfig
from ..distributed.engine import bare_model
from ..distributed.engines import engine_of, release_gathered_weights
from ..errors import SpftError, in_plain_words
from ..importance.class_column import calibrates_by_class, hide_classes
from ..ranking.scores import ImportanceScores
from ..report.figures import RunFigures, optimizer_state_bytes, write_report
from ..tuner.model import (
    active_spft_adapter,
    deltas,
    is_selected,
    layer_sizes,
    restore_base,
    write_through,
)
from .methods import TrainerMethods, give_methods

logger = logging.getLogger(__name__)

IMPORTANCE_FILE = "spft_importance.safetensors"
SELECTION_FILE = "spft_selection.safetensors"


class SpftCallback(TrainerCallback):
    """Selects the neurons when training begins and writes the report when it ends.

    Meanwhile the base weights may hold the update (`SpftConfig.forward`); in the end they are as
    they were.

    `prepare_trainer` adds it to a trainer. Selection happens once the engine is fully prepared and
    only in a fresh adapter; a resumed or continued one keeps its neurons.

    Attributes:
        logger: takes the progress messages; front ends whose users see only their own may set it.
    """

    logger = logger

    def __init__(self, trainer: Trainer) -> None:
        if not isinstance(trainer, TrainerMethods):
            warnings.warn(
                "trainer.add_callback(SpftCallback(trainer)) will stop working; call "
                "trainer_ext.prepare_trainer(trainer) instead",
                FutureWarning,
                stacklevel=2,
            )
        give_methods(trainer)
        self.trainer = trainer
        self.scores: ImportanceScores | None = None
        self._step_seconds: list[float] = []
        self._step_started: float | None = None

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        model, adapter_name = self._prepared_model()
        if self.trainer.reference_is_too_early:
            raise SpftError(
                "precompute_ref_log_probs is set, but over a quantised base the reference has the "
                "original rows of neurons that were not selected yet; drop it, or set `quant_init` "
                "to 'none'"
            )
        if not any(d.held_weight.requires_grad for d in deltas(model, adapter_name).values()):
            raise SpftError(
                f"adapter {adapter_name!r} is frozen, as PeftModel.from_pretrained loads it; give "
                "that is_trainable=True"
            )
        self._step_seconds.clear()
        self.trainer.run_guard.check_processes_agree(model, adapter_name)
        if not is_selected(model, adapter_name):
            self._select(model, adapter_name, args)
        elif self.scores is None:  # else train() was called again, or retried
            self.scores = self._scores_of_this_run(model, adapter_name)
        self.trainer.run_guard.check_same_neurons(model, adapter_name)
        self.logger.info(
            "SPFT writes through in %d of %d layers",
            write_through(model, adapter_name),
            len(layer_sizes(model, adapter_name)),
        )

    def _select(self, model, adapter_name: str, args) -> None:
        """Choose the neurons, by scores from a file or from calibrating."""
        config = model.peft_config[adapter_name]
        if config.importance_file:
            self.scores = load_scores(config.importance_file, model, adapter_name)
            self._warn_of_other_data(config)
        else:
            self.scores = self._calibrate(model, adapter_name, config)
        selection = select_by_scores(model, self.scores, adapter_name)
        if self.trainer.is_world_process_zero():
            self.scores.save(Path(args.output_dir) / IMPORTANCE_FILE)
            selection.save(Path(args.output_dir) / SELECTION_FILE)
        self.logger.info(
            "SPFT selected %d neurons in %d layers by %s (%d batches, %.1f s)",
            sum(index.numel() for index in selection.index.values()),
            len(selection.index),
            self.scores.metric,
            self.scores.batches,
            self.scores.seconds,
        )

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._step_started = time.perf_counter()

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        if engine_of(self.trainer).steps_copies:
            model = bare_model(self.trainer)
            write_through(model, active_spft_adapter(model))

    def on_step_end(self, args, state, control, **kwargs) -> None:
        if self._step_started is not None:
            self._step_seconds.append(time.perf_counter() - self._step_started)
            self._step_started = None

    def on_train_end(self, args, state, control, **kwargs) -> None:
        restore_base(bare_model(self.trainer))
        if not self.trainer.is_world_process_zero():
            return
        model = bare_model(self.trainer)
        adapter_name = active_spft_adapter(model)
        figures = RunFigures(
            step_seconds=statistics.median(self._step_seconds) if self._step_seconds else None,
            steps_timed=len(self._step_seconds),
            optimizer_state_bytes=optimizer_state_bytes(self.trainer.optimizer),
            log_history=state.log_history,
        )
        write_report(args.output_dir, model, adapter_name, self.scores, figures)

    def calibrate(self) -> ImportanceScores:
        """Score the neurons of the adapter, and change nothing.

        Must be called when training begins: the engine and the data loader are ready then.

        Raises:
            SpftError: the engine, the adapter or the data does not allow it.
        """
        model, adapter_name = self._prepared_model()
        return self._calibrate(model, adapter_name, model.peft_config[adapter_name])

    def _prepared_model(self) -> tuple[PeftModel, str]:
        """The model that is about to be trained or calibrated, and its SPFT adapter's name."""
        engine = engine_of(self.trainer)
        engine.refuse_unsupported(self.trainer)
        model = bare_model(self.trainer)
        engine.before_first_forward(model, self.trainer.model_wrapped)
        adapter_name = active_spft_adapter(model)
        if calibrates_by_class(model.peft_config[adapter_name]):
            hide_classes(model)  # model_init may have made another model
            if self.trainer.class_mistake and not is_selected(model, adapter_name):
                raise self.trainer.class_mistake
        return model, adapter_name

    def _calibrate(self, model, adapter_name: str, config: SpftConfig) -> ImportanceScores:
        if not METRICS[config.importance].needs_data:
            return measure_importance(model, (), adapter_name)
        trainer, count = self.trainer, config.calibration_batches
        by_gradients = METRICS[config.importance].needs_gradients
        if by_gradients and trainer.accelerator.mixed_precision == "fp16":
            raise SpftError(
                f"fp16 with `importance` {config.importance!r}: fp16 gradients underflow without "
                "loss scaling, which calibration has not; use bf16, or `importance`: magnitude"
            )
        data = DataFingerprint()
        bar = tqdm(
            total=count,
            desc=f"SPFT calibration ({config.importance})",
            disable=trainer.args.disable_tqdm or not trainer.is_local_process_zero(),
        )
        with bar, untouched(trainer):
            batches = self.trainer.run_guard.noting(data.noting(first_batches(trainer, count)))
            batches = (batch.prepared() for batch in batches)
            scores = measure_importance(model, batches, adapter_name, on_batch=bar.update)
        release_gathered_weights(model, trainer.model_wrapped)
        if scores.batches < count:
            logger.warning(
                "SPFT calibrated on %d batches instead of calibration_batches = %d: one epoch of "
                "the training data holds no more",
                scores.batches,
                count,
            )
        for warning in scores.warnings:
            logger.warning("%s", self.words(warning))
        return replace(scores, metadata={**scores.metadata, "data": data.value()})

    def _warn_of_other_data(self, config: SpftConfig) -> None:
        """Say so if the scores were made on other batches than calibrating now would see."""
        made_on = self.scores.metadata.get("data")
        if made_on is None or may_be_one_shot(self.trainer.train_dataset):
            return  # looking at such a stream would take batches away from training
        data = DataFingerprint()
        with untouched(self.trainer):
            for _ in data.noting(first_batches(self.trainer, self.scores.batches)):
                pass
        if data.value() != made_on:
            logger.warning(
                "importance_file %s was made on other data than the first %d batches of this run",
                config.importance_file,
                self.scores.batches,
            )

    def words(self, message: str) -> str:
        """A message that has fields of SpftConfig in backticks, as the front end names them."""
        return in_plain_words(message)

    def _scores_of_this_run(self, model, adapter_name: str) -> ImportanceScores | None:
        """Scores of the interrupted run that is being resumed, for its report."""
        path = Path(self.trainer.args.output_dir) / IMPORTANCE_FILE
        # The process that writes the report may be the only one that has the file: nothing here may
        # need the others.
        if not self.trainer.is_world_process_zero():
            return None
        if self.trainer.state.global_step == 0 or not path.is_file():
            return None
        try:
            return ImportanceScores.load_for(path, layer_sizes(model, adapter_name))
        except SpftError as error:
            logger.warning("the report will lack the importance scores: %s", error)
            return None

"""Saving and resuming of any trainer: small, whole, and independent of the engine."""

from __future__ import annotations

import logging
import os
from pathlib import Path

from transformers import TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ..distributed.engine import bare_model
from ..distributed.engines import engine_of
from ..distributed.processes import wait_for_all, world_size
from ..errors import SpftError
from ..tuner.model import selection_buffers
from .folders import (
    CheckpointMark,
    begin_checkpoint,
    check_given_checkpoint,
    finish_checkpoint,
    last_complete,
)
from .state import OPTIMIZER_FILE, TrainingState, own_optimizer_file, plain_name

logger = logging.getLogger(__name__)


class CheckpointMixin:
    """Saving and resuming for a class of trainers; put it before the trainer's class.

    - A checkpoint holds the adapter and its optimizer's state, never the base model: under engines
      that divide them, what `TrainingState` puts together, in the files of a run without engine.
    - Its folder says whether it is complete (`folders`); an older one is removed only after that.
    - `train(resume_from_checkpoint=True)` goes on from the last complete one, under whichever
      engine and number of processes.
    """

    # names of the trained parameters by group, as the optimizer was constructed
    _spft_groups: tuple[list[str], ...] = ()
    _spft_state: TrainingState | None = None

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """As the trainer's.

        Raises:
            SpftError: the checkpoint is incomplete, or cannot be gone on from here.
        """
        engine_of(self).settle_checkpointing(self)
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_complete(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise SpftError(
                    f"resume_from_checkpoint is True but {self.args.output_dir!r} holds no "
                    "complete checkpoint; start anew without it"
                )
        elif resume_from_checkpoint:
            resume_from_checkpoint = check_given_checkpoint(resume_from_checkpoint)
        if resume_from_checkpoint:
            _check_resumable(resume_from_checkpoint, engine_of(self).name, _global_batch(self.args))
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def create_optimizer(self, *args, **kwargs):
        optimizer = super().create_optimizer(*args, **kwargs)
        names = {id(p): plain_name(n) for n, p in self.model.named_parameters()}
        self._spft_groups = tuple(
            [names[id(p)] for p in g["params"]] for g in optimizer.param_groups
        )
        return optimizer

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        self._spft_state = None
        engine = engine_of(self)
        divided = engine.divides_state
        # every process selects or reads by itself which neurons are selected
        with engine.leave_buffers_alone(self.model, selection_buffers(self.model)):
            prepared = super()._prepare_for_training(
                max_steps, train_dataloader, None if divided else resume_from_checkpoint
            )
        if divided and resume_from_checkpoint is not None:
            self._training_state.load_adapter(resume_from_checkpoint)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
            self._load_scaler(resume_from_checkpoint)
        return prepared

    @property
    def _divides_state(self) -> bool:
        return engine_of(self).divides_state

    @property
    def _training_state(self) -> TrainingState:
        """What this run trains, wherever its engine keeps it; made once the trainer is prepared."""
        if self._spft_state is None:
            self._spft_state = TrainingState(
                engine_of(self), bare_model(self), self.optimizer, self._spft_groups
            )
        return self._spft_state

    def _load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or not (self._divides_state or world_size() > 1):
            return super()._load_optimizer_and_scheduler(checkpoint)
        whole = os.path.join(checkpoint, OPTIMIZER_FILE)
        if not own_optimizer_file(checkpoint).is_file() and not os.path.isfile(whole):
            logger.warning("%s holds no optimizer state; its moments start anew", checkpoint)
            return None
        self._training_state.load_optimizer(checkpoint)
        self._training_state.load_scheduler(self.lr_scheduler, checkpoint)
        return None

    def save_model(self, output_dir=None, _internal_call=False):
        if not self._divides_state or self.optimizer is None:  # not trained yet
            return super().save_model(output_dir, _internal_call)
        tensors = self._training_state.adapters()
        if self.args.should_save:
            self._save(output_dir or self.args.output_dir, state_dict=tensors)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)
        return None

    def _save_checkpoint(self, model, trial, **kwargs):
        args, step = self.args, self.state.global_step
        run_dir = self._get_output_dir(trial=trial)
        folder = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")
        mark = CheckpointMark(
            complete=False,
            step=step,
            engine=engine_of(self).name,
            world_size=world_size(),
            global_batch=_global_batch(args),
        )
        begin_checkpoint(folder, mark)
        # transformers removes older checkpoints before this one is known to be complete
        limit, args.save_total_limit = args.save_total_limit, None
        try:
            result = super()._save_checkpoint(model, trial, **kwargs)
        finally:
            args.save_total_limit = limit
        finish_checkpoint(folder, mark)
        if args.should_save:
            rotate_checkpoints(
                output_dir=run_dir,
                save_total_limit=limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )
        return result

    def _save_optimizer_and_scheduler(self, output_dir):
        if not self._divides_state:
            return super()._save_optimizer_and_scheduler(output_dir)
        self._training_state.save_optimizer(output_dir)
        self._training_state.save_scheduler(self.lr_scheduler, output_dir)
        return None

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        given, model = model, model if model is not None else self.model
        dtypes = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
        super()._load_from_checkpoint(resume_from_checkpoint, given)
        # Where there are adapters in sub-folders (TRL's "ref"), transformers loads them alone.
        if len(getattr(model, "peft_config", ())) > 1:
            name = model.active_adapters[0]
            if not (Path(resume_from_checkpoint) / name).is_dir():
                model.load_adapter(resume_from_checkpoint, name, is_trainable=True)
        # PEFT makes them fp32; deltas that were made bf16 (autocast_adapter_dtype=False) stay so.
        for name, parameter in model.named_parameters():
            if name in dtypes:
                parameter.data = parameter.data.to(dtypes[name])

    def _load_best_model(self):
        if not self._divides_state:
            return super()._load_best_model()
        wait_for_all()
        logger.info("loading the best adapter from %s", self.state.best_model_checkpoint)
        return self._training_state.load_adapter(self.state.best_model_checkpoint)


def _check_resumable(folder: str, engine: str, global_batch: int) -> None:
    """Refuse or warn of a checkpoint that was made under another engine or by other batches."""
    mark = CheckpointMark.read(folder)
    if mark is None:
        return
    if (engine, world_size()) != (mark.engine, mark.world_size):
        if any(Path(folder).glob("optimizer_*_of_*.pt")):
            raise SpftError(
                f"{folder!r} holds 8-bit moments as {mark.world_size} processes of {mark.engine} "
                f"had them, which {world_size()} of {engine} cannot divide anew; resume with "
                "those, or start from its adapter (lora_model_dir) with fresh moments"
            )
        logger.warning(
            "resuming under %s with %d processes from a checkpoint made under %s with %d",
            engine,
            world_size(),
            mark.engine,
            mark.world_size,
        )
    if mark.global_batch != global_batch:
        logger.warning(
            "an optimizer step had %d rows when %s was made and has %d now: the data that follows "
            "is not that of the interrupted run",
            mark.global_batch,
            folder,
            global_batch,
        )


def _global_batch(args: TrainingArguments) -> int:
    """Rows of one optimizer step over all processes."""
    return args.train_batch_size * args.gradient_accumulation_steps * args.world_size

"""Saving and resuming of any trainer: small, whole, and independent of the engine."""

from __future__ import annotations

import logging
import os
from contextlib import contextmanager, nullcontext
from pathlib import Path

from transformers import Trainer
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from ..distributed import (
    Engine,
    bare_model,
    keep_from_broadcast,
    settle_checkpointing,
    wait_for_all,
    world_size,
)
from ..errors import SpftError
from ..tuner.model import buffers_out_of_state_dict, selection_buffers
from .folders import (
    CheckpointMark,
    begin_checkpoint,
    check_given_checkpoint,
    finish_checkpoint,
    last_complete,
)
from .state import OPTIMIZER_FILE, TrainingState, own_optimizer_file, plain_name

logger = logging.getLogger(__name__)


class CheckpointKeeper:
    """Takes over a trainer's checkpoints.

    - A checkpoint holds the adapter and its optimizer's state, never the base model: under engines
      that divide them, what `TrainingState` puts together, in the files of a run without engine.
    - Its folder says whether it is complete (`checkpoints`); an older one is removed only after
      that.
    - `train(resume_from_checkpoint=True)` goes on from the last complete one, under whichever
      engine and number of processes.

    All of it happens in methods of the instance, so it works with subclasses of Trainer that
    override them, as Axolotl's and TRL's do.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self._groups: list[list[str]] = []
        for name in (
            "train",
            "create_optimizer",
            "_prepare_for_training",
            "save_model",
            "_save_checkpoint",
            "_save_optimizer_and_scheduler",
            "_load_optimizer_and_scheduler",
            "_load_from_checkpoint",
            "_load_best_model",
        ):
            setattr(self, f"_trainers_{name.strip('_')}", getattr(trainer, name))
            setattr(trainer, name, getattr(self, name.strip("_")))

    @property
    def _divided(self) -> bool:
        return Engine.of(self.trainer).divides_state

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """As the trainer's.

        Raises:
            SpftError: the checkpoint is incomplete, or cannot be gone on from here.
        """
        settle_checkpointing(self.trainer)
        if resume_from_checkpoint is True:
            output_dir = self.trainer.args.output_dir
            resume_from_checkpoint = last_complete(output_dir)
            if resume_from_checkpoint is None:
                raise SpftError(
                    f"resume_from_checkpoint is True but {output_dir!r} holds no complete "
                    "checkpoint; start anew without it"
                )
        elif resume_from_checkpoint:
            resume_from_checkpoint = check_given_checkpoint(resume_from_checkpoint)
        if resume_from_checkpoint:
            self._check_resumable(resume_from_checkpoint)
        return self._trainers_train(resume_from_checkpoint, *args, **kwargs)

    def _check_resumable(self, folder: str) -> None:
        mark = CheckpointMark.read(folder)
        if mark is None:
            return
        engine = Engine.of(self.trainer).name
        if (engine, world_size()) != (mark.engine, mark.world_size):
            if any(Path(folder).glob("optimizer_*_of_*.pt")):
                raise SpftError(
                    f"{folder!r} holds 8-bit moments as {mark.world_size} processes of "
                    f"{mark.engine} had them, which {world_size()} of {engine} cannot divide anew; "
                    "resume with those, or start from its adapter (lora_model_dir) with fresh "
                    "moments"
                )
            logger.warning(
                "resuming under %s with %d processes from a checkpoint made under %s with %d",
                engine,
                world_size(),
                mark.engine,
                mark.world_size,
            )
        if mark.global_batch != self._global_batch():
            logger.warning(
                "an optimizer step had %d rows when %s was made and has %d now: the data that "
                "follows is not that of the interrupted run",
                mark.global_batch,
                folder,
                self._global_batch(),
            )

    def create_optimizer(self, *args, **kwargs):
        optimizer = self._trainers_create_optimizer(*args, **kwargs)
        names = {id(p): plain_name(n) for n, p in self.trainer.model.named_parameters()}
        self._groups = [[names[id(p)] for p in group["params"]] for group in optimizer.param_groups]
        return optimizer

    def prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        divided = self._divided
        with _spft_buffers_left_alone(self.trainer):
            prepared = self._trainers_prepare_for_training(
                max_steps, train_dataloader, None if divided else resume_from_checkpoint
            )
        if divided and resume_from_checkpoint is not None:
            self._state().load_adapter(resume_from_checkpoint)
            self.load_optimizer_and_scheduler(resume_from_checkpoint)
            self.trainer._load_scaler(resume_from_checkpoint)
        return prepared

    def load_optimizer_and_scheduler(self, checkpoint):
        if checkpoint is None or Engine.of(self.trainer).kind == "none":
            return self._trainers_load_optimizer_and_scheduler(checkpoint)
        whole = os.path.join(checkpoint, OPTIMIZER_FILE)
        if not own_optimizer_file(checkpoint).is_file() and not os.path.isfile(whole):
            logger.warning("%s holds no optimizer state; its moments start anew", checkpoint)
            return None
        state = self._state()
        state.load_optimizer(checkpoint)
        state.load_scheduler(self.trainer.lr_scheduler, checkpoint)
        return None

    def _state(self) -> TrainingState:
        trainer = self.trainer
        return TrainingState(
            Engine.of(trainer), bare_model(trainer), trainer.optimizer, self._groups
        )

    def save_model(self, output_dir=None, _internal_call=False):
        trainer = self.trainer
        if not self._divided or trainer.optimizer is None:  # not trained yet
            return self._trainers_save_model(output_dir, _internal_call)
        tensors = self._state().adapters()
        if trainer.args.should_save:
            trainer._save(output_dir or trainer.args.output_dir, state_dict=tensors)
        if trainer.args.push_to_hub and not _internal_call:
            trainer.push_to_hub(commit_message="Model save", revision=trainer.args.hub_revision)
        return None

    def save_checkpoint(self, model, trial, **kwargs):
        trainer = self.trainer
        args, step = trainer.args, trainer.state.global_step
        run_dir = trainer._get_output_dir(trial=trial)
        folder = os.path.join(run_dir, f"{PREFIX_CHECKPOINT_DIR}-{step}")
        mark = CheckpointMark(
            complete=False,
            step=step,
            engine=Engine.of(trainer).name,
            world_size=world_size(),
            global_batch=self._global_batch(),
        )
        begin_checkpoint(folder, mark)
        limit, args.save_total_limit = args.save_total_limit, None
        try:
            result = self._trainers_save_checkpoint(model, trial, **kwargs)
        finally:
            args.save_total_limit = limit
        finish_checkpoint(folder, mark)
        if args.should_save:
            rotate_checkpoints(
                output_dir=run_dir,
                save_total_limit=limit,
                best_model_checkpoint=trainer.state.best_model_checkpoint,
                use_mtime=True,
            )
        return result

    def save_optimizer_and_scheduler(self, output_dir):
        if not self._divided:
            return self._trainers_save_optimizer_and_scheduler(output_dir)
        state = self._state()
        state.save_optimizer(output_dir)
        state.save_scheduler(self.trainer.lr_scheduler, output_dir)
        return None

    def load_from_checkpoint(self, resume_from_checkpoint, model=None):
        given, model = model, model if model is not None else self.trainer.model
        dtypes = {name: p.dtype for name, p in model.named_parameters() if p.requires_grad}
        self._trainers_load_from_checkpoint(resume_from_checkpoint, given)
        # Where there are adapters in sub-folders (TRL's "ref"), transformers loads them alone.
        if len(getattr(model, "peft_config", ())) > 1:
            name = model.active_adapters[0]
            if not (Path(resume_from_checkpoint) / name).is_dir():
                model.load_adapter(resume_from_checkpoint, name, is_trainable=True)
        # PEFT makes them fp32; deltas that were made bf16 (autocast_adapter_dtype=False) stay so.
        for name, parameter in model.named_parameters():
            if name in dtypes:
                parameter.data = parameter.data.to(dtypes[name])

    def load_best_model(self):
        if not self._divided:
            return self._trainers_load_best_model()
        wait_for_all()
        logger.info("loading the best adapter from %s", self.trainer.state.best_model_checkpoint)
        return self._state().load_adapter(self.trainer.state.best_model_checkpoint)

    def _global_batch(self) -> int:
        args = self.trainer.args
        return args.train_batch_size * args.gradient_accumulation_steps * args.world_size


@contextmanager
def _spft_buffers_left_alone(trainer: Trainer):
    """Engines need not send which neurons are selected: every process selects or reads them itself.

    DDP would do so before every forward. FSDP2's loading by one process takes everything in the
    state dict for a sharded parameter.
    """
    kind = Engine.of(trainer).kind
    if kind == "ddp":
        keep_from_broadcast(trainer.model, selection_buffers(trainer.model))
    with buffers_out_of_state_dict(trainer.model) if kind == "fsdp2" else nullcontext():
        yield

"""RunGuard: a process that dies, hangs or differs ends the run with a message that names it."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.distributed_c10d import _get_default_store
from transformers import Trainer, TrainerCallback

from ..distributed.engine import bare_model
from ..distributed.processes import process_rank, world_size
from ..distributed.shards import is_sharded
from ..tuner.model import deltas
from ..tuner.targets import name_in_base_model
from .agreement import check_agreement, check_same_values, checksums
from .exceptions import begin_watch, end_watch
from .settings import run_facts
from .verdict import DONE
from .watchdog import Watchdog

logger = logging.getLogger(__name__)

_STORE_TIMEOUT = timedelta(seconds=10)
# The backends end a process for a collective that takes ddp_timeout; before that, say who hangs.
_SHARE_OF_TIMEOUT = 0.9


class RunGuard(TrainerCallback):
    """Compares the processes of a run and watches over them; does nothing with one process.

    A trainer gets it before the callback that carries the run, so it is called first.

    Attributes:
        hang_after: seconds without any progress; default 0.9 of the trainer's ddp_timeout.
        dead_after: seconds without a sign of life of a process.
        interval: seconds between signs of life; default by the number of processes.
    """

    hang_after: float | None = None
    dead_after: float = 60.0
    interval: float | None = None
    _runs = 0  # trainings of this process that were watched: each has its own part of the store

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._watchdog: Watchdog | None = None
        self._checked_step = -1

    # What must agree

    def check_processes_agree(self, model: nn.Module, adapter_name: str) -> None:
        """Refuse to begin where processes were started differently; all of them must ask.

        Raises:
            SpftError: names the rank and what differs.
        """
        if world_size() > 1:
            check_agreement(run_facts(self._trainer, model, adapter_name))

    def check_same_neurons(self, model: nn.Module, adapter_name: str) -> None:
        """Refuse to train where processes have other neurons; all of them must ask.

        Raises:
            SpftError: names the rank and the layer.
        """
        if world_size() == 1:
            return
        chosen = {}
        for name, delta in deltas(model, adapter_name).items():
            chosen[f"the selection in {name}"] = delta.index
            if delta.anchor is not None:  # each has read it from its own disk
                chosen[f"what the neurons start from in {name}"] = delta.anchor
        sums = zip(chosen, checksums(chosen.values()), strict=True)
        check_agreement({n: f"{s & (2**64 - 1):x}" for n, s in sums})

    def _check_replicas(self, state) -> None:
        """Before a checkpoint is written: are replicated values the same bits everywhere?"""
        if world_size() == 1 or self._checked_step == state.global_step:
            return
        self._checked_step = state.global_step
        check_same_values(_replicated(bare_model(self._trainer)), state.global_step)

    # Signs of progress

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        self._checked_step = -1
        if world_size() > 1:
            self._start(args)
            self._note(state.global_step, "starting", patient=True)

    def noting(self, batches: Iterable) -> Iterator:
        """The same calibration batches; each is a sign of progress."""
        step = self._trainer.state.global_step
        for batch in batches:
            self._note(step, "calibrating")
            yield batch
        self._note(step, "selecting")

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        self._note(state.global_step + 1, "training")

    def on_substep_end(self, args, state, control, **kwargs) -> None:
        self._note(state.global_step + 1, "training")

    def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
        self._note(state.global_step + 1, "optimizer step")

    def on_optimizer_step(self, args, state, control, **kwargs) -> None:
        self._note(state.global_step + 1, "after the optimizer step")

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self._between_steps(state, control)

    def on_epoch_end(self, args, state, control, **kwargs) -> None:
        self._between_steps(state, control)

    def on_prediction_step(self, args, state, control, **kwargs) -> None:
        self._note(state.global_step, "evaluating")

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        self._note(state.global_step, "after the evaluation", patient=True)

    def on_save(self, args, state, control, **kwargs) -> None:
        # A callback may have asked for this checkpoint after the step was seen here.
        self._check_replicas(state)
        self._note(state.global_step, "after saving")

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self._check_replicas(state)
        end_watch(DONE)
        self._watchdog = None

    def _between_steps(self, state, control) -> None:
        if control.should_save:
            self._check_replicas(state)
            self._note(state.global_step, "saving a checkpoint", patient=True)
        else:
            phase = "evaluating" if control.should_evaluate else "between steps"
            self._note(state.global_step, phase)

    def _note(self, step: int, phase: str, patient: bool = False) -> None:
        if self._watchdog is not None:
            self._watchdog.note(step, phase, patient)

    # The watchdog of this run

    def _start(self, args) -> None:
        self._watchdog = None  # of an earlier training that ended by an exception
        RunGuard._runs += 1
        store, address = _own_store(f"spft_watchdog/{RunGuard._runs}")
        if store is None:
            logger.warning(
                "torch.distributed has no store that can be shared here, so a process that hangs "
                "or dies is found by the time-outs of its backend alone"
            )
            return
        self._watchdog = Watchdog(
            store,
            process_rank(),
            world_size(),
            hang_after=self.hang_after or _SHARE_OF_TIMEOUT * args.ddp_timeout,
            dead_after=self.dead_after,
            interval=self.interval,
            address=address,
            loop=Trainer.train.__code__,
        )
        begin_watch(self._watchdog)


def _replicated(model: nn.Module) -> dict[str, torch.Tensor]:
    """Trained parameters that every process holds whole; deltas by their layers' names."""
    return {
        name_in_base_model(name.split(".spft_delta.")[0]): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not is_sharded(parameter)
    }


def _own_store(prefix: str) -> tuple[dist.Store | None, str]:
    """A connection of its own to the store of the default process group, and its address.

    A blocked training thread does not block it. None where the store cannot be cloned (MPI has
    none).
    """
    try:
        store = _get_default_store()
        inner = store
        while isinstance(inner, dist.PrefixStore):
            inner = inner.underlying_store
        store = store.clone()
        store.set_timeout(_STORE_TIMEOUT)
    except (RuntimeError, ValueError, AttributeError, NotImplementedError) as error:
        logger.debug("no store to watch by: %s", error)
        return None, ""
    host, port = getattr(inner, "host", ""), getattr(inner, "port", "")
    return dist.PrefixStore(prefix, store), f"{host}:{port}" if host else ""

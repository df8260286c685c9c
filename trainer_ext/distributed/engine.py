"""What SPFT asks of an engine: each file in `engines` answers for one of them.

Nothing outside of them asks which engine runs. An engine is asked in two ways: as the object of a
running trainer, and by a parameter, of which it may hold a part on each process (`Sharding`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn
from transformers import Trainer

from .parts import Part

logger = logging.getLogger(__name__)


class Engine:
    """What makes a trainer's processes one run; this class itself: one process.

    Attributes:
        name: as users call it: "one process", "DDP", "ZeRO-2", "FSDP2".
        steps_copies: the optimizer steps copies of the parameters, which the engine writes back.
        divides_state: each process holds but a part of the optimizer's state.
        waits_in: parts of the paths of files in which a thread waits for other processes.
    """

    name = "one process"
    steps_copies = False
    divides_state = False
    # collectives, and the backward with DDP's
    waits_in: tuple[str, ...] = (
        "/torch/distributed/",
        "/torch/nn/parallel/",
        "/torch/autograd/graph.py",
    )

    @classmethod
    def of(cls, trainer: Trainer) -> Engine | None:
        """The engine, if the trainer runs under one of this class.

        Raises:
            SpftError: it does, but SPFT does not train under that variant.
        """
        return cls()

    def refuse_unsupported(self, trainer: Trainer) -> None:
        """Refuse what SPFT cannot train or save under.

        Raises:
            SpftError: names the engine or its setting.
        """

    def keeps_client_optimizer(self, trainer: Trainer) -> bool:
        """Whether the engine steps with the optimizer that the trainer makes."""
        return True

    def wants_reentrant(self, trainer: Trainer, reentrant: bool) -> bool | None:
        """The variant of activation checkpointing to use instead of this one; None: this one."""
        return None

    def settle_checkpointing(self, trainer: Trainer) -> None:
        """Choose the variant of activation checkpointing that works here, with a log line.

        Must be called before training.
        """
        args = trainer.args
        if not args.gradient_checkpointing:
            return
        kwargs = dict(args.gradient_checkpointing_kwargs or {})
        reentrant = bool(kwargs.get("use_reentrant"))
        wanted = self.wants_reentrant(trainer, reentrant)
        if wanted is not None:
            logger.warning(
                "gradient checkpointing with use_reentrant: %s does not work under %s; using %s",
                reentrant,
                self.name,
                str(wanted).lower(),
            )
            args.gradient_checkpointing_kwargs = {**kwargs, "use_reentrant": wanted}
        if reentrant if wanted is None else wanted:
            # The reentrant variant drops the graph of blocks whose input needs no gradient.
            trainer.model.enable_input_require_grads()

    def leave_buffers_alone(
        self, model: nn.Module, buffers: Iterable[str]
    ) -> AbstractContextManager:
        """While the model is prepared, keep the engine from sending or sharding these buffers.

        All processes have them alike.
        """
        return nullcontext()

    def before_first_forward(self, model: nn.Module, wrapped: nn.Module) -> None:
        """Settle what depends on which parameters are trained, before any is frozen for a time.

        Args:
            wrapped: the trainer's prepared model.
        """

    def parts(self, optimizer: torch.optim.Optimizer, named: dict[str, nn.Parameter]) -> list[Part]:
        """Where the trained parameters lie that this process steps, in the order of `named`.

        Args:
            optimizer: as the trainer has it, in the wrappers of accelerate and DeepSpeed.
            named: name -> trained parameter of the prepared model, in the same order on all
                processes.

        Raises:
            SpftError: the optimizer is of a kind whose layout is not known.
        """
        return [Part(n, p, tuple(p.shape), p, 0, 0, p.numel()) for n, p in named.items()]

    def whole_groups(self, optimizer: torch.optim.Optimizer) -> AbstractContextManager:
        """The innermost optimizer with all that it steps in its groups."""
        return nullcontext(innermost_optimizer(optimizer))

    @staticmethod
    def release_gathered_weights(model: nn.Module, wrapped: nn.Module | None) -> None:
        """Shard again what passes outside of the engine's own schedule have gathered.

        Called for every engine, whichever runs.
        """


def innermost_optimizer(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """An optimizer without the wrappers of accelerate and DeepSpeed."""
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def bare_model(trainer: Trainer) -> nn.Module:
    """The trainer's model without the wrappers of an engine or of torch.compile."""
    return trainer.accelerator.unwrap_model(trainer.model_wrapped, keep_torch_compile=False)

"""A trainer's own loss on its own first batches, without leaving a trace in it."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch.utils.data import IterableDataset

from ..distributed.engine import bare_model
from ..errors import SpftError
from .mode import random_state_kept

_SCALARS = (int, float, complex, str, bytes, bool, type(None))


def first_batches(trainer, count: int) -> Iterator[OptimizerStepBatch]:
    """The data of the trainer's first optimizer steps as calibration batches.

    They are what training will see: same data loader, order, collator and accumulation. Call
    inside `untouched(trainer)`.

    Args:
        count: batches at most; fewer if one epoch holds fewer.

    Raises:
        SpftError: the dataset is a one-shot stream, whose data training would then miss.
    """
    loader = trainer.callback_handler.train_dataloader
    if hasattr(loader, "set_epoch"):
        loader.set_epoch(int(trainer.state.epoch or 0))
    iterator = iter(loader)
    if may_be_one_shot(trainer.train_dataset):
        first = next(iterator, None)
        iterator = iter(loader)
        again = next(iterator, None)
        if not _same_batch(first, again):
            raise SpftError(
                "the training dataset is a stream that does not start over, so calibrating on it "
                "would take batches away from training; give an `importance_file`, "
                "use a data-free `importance` (magnitude), or make "
                "the dataset's __iter__ start from the beginning"
            )
        iterator = iter(loader)
    for _ in range(count):
        micro_batches, num_items = trainer.get_batch_samples(
            iterator, trainer.args.gradient_accumulation_steps, trainer.args.device
        )
        if not micro_batches:
            return
        yield OptimizerStepBatch(trainer, micro_batches, num_items)


class OptimizerStepBatch:
    """A `CalibrationBatch` of a trainer: the data of one optimizer step, and the trainer's loss.

    Attributes:
        micro_batches: one for each accumulation step, as the data loader gave them.
    """

    def __init__(self, trainer, micro_batches: list, num_items) -> None:
        self.micro_batches = micro_batches
        self._trainer, self._num_items = trainer, num_items
        self._inputs: list | None = None

    def prepared(self) -> OptimizerStepBatch:
        """This batch with the inputs of the loss made, once for all its runs.

        GRPO samples its completions here, so it must be done by the unperturbed model.
        """
        trainer = self._trainer
        trainer.current_gradient_accumulation_steps = len(self.micro_batches)
        self._inputs = []
        for micro_batch in self.micro_batches:
            self._inputs.append(
                trainer._prepare_inputs(
                    dict(micro_batch) if isinstance(micro_batch, Mapping) else micro_batch
                )
            )
            if hasattr(trainer, "_step"):
                # GRPO and RLOO count micro-batches, to know which of the sampled ones is due
                trainer._step += 1
        return self

    def run(self, backward: bool) -> torch.Tensor:
        """See `CalibrationBatch`."""
        if self._inputs is None:
            self.prepared()
        trainer, num_items = self._trainer, self._num_items
        model = bare_model(trainer)  # an engine's wrapper would start its gradient machinery
        trainer.current_gradient_accumulation_steps = len(self._inputs)
        total = torch.zeros((), device=trainer.args.device)
        for inputs in self._inputs:
            # compute_loss may take entries out of its inputs, and the batch may be run again.
            inputs = dict(inputs) if isinstance(inputs, Mapping) else inputs
            with _flags_kept(model), trainer.compute_loss_context_manager():
                loss = trainer.compute_loss(model, inputs, num_items_in_batch=num_items)
            # Trainer.training_step's own normalisation, which compute_loss does not include
            if (
                not trainer.model_accepts_loss_kwargs or num_items is None
            ) and trainer.compute_loss_func is None:
                loss = loss / len(self._inputs)
            if backward:
                loss.backward()
            total = total + loss.detach()
        return total


@contextmanager
def _flags_kept(model):
    """Put requires_grad back on exit: after a reference forward PEFT lets the adapter train again,
    and the backward of the policy would leave gradients in it."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def may_be_one_shot(dataset) -> bool:
    """Whether a dataset may be a stream that does not start over when it is iterated again."""
    if not isinstance(dataset, IterableDataset):
        return False
    # Hugging Face's iterable datasets start over by contract, and filling their shuffle buffers
    # twice more would cost minutes.
    return not type(dataset).__module__.startswith("datasets.")


def _same_batch(a, b) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and torch.equal(a, b)
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return a.keys() == b.keys() and all(_same_batch(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(_same_batch, a, b))
    return a == b


@contextmanager
def untouched(trainer):
    """Put the trainer's own bookkeeping back on exit: metrics, state, data loader references; and
    the random states, from which loaders draw.

    Trainers count tokens, collect rewards and log entropies inside their loss. Whatever plain data
    they keep in themselves or in their state is restored, in place, to what it was.
    """
    accelerator = trainer.accelerator
    gradient_state = accelerator.gradient_state
    loader = trainer.callback_handler.train_dataloader
    kept = [
        # the data sets may be plain lists: the user's own, large, and not the trainer's bookkeeping
        _PlainState(trainer, leave_out=("train_dataset", "eval_dataset")),
        _PlainState(trainer.state),
        # Only numbers: the list of a packing sampler's batches is long and is made anew anyway.
        _PlainState(loader, _SCALARS),
        _PlainState(getattr(loader, "batch_sampler", None), _SCALARS),
    ]
    generators = [(g, g.get_state()) for g in _generators(loader)]
    loaders = list(accelerator._dataloaders)
    references = list(gradient_state.dataloader_references)
    sync_gradients = gradient_state.sync_gradients
    try:
        with random_state_kept():
            yield
    finally:
        for state in kept:
            state.restore()
        for generator, generator_state in generators:
            generator.set_state(generator_state)
        accelerator._dataloaders[:] = loaders
        gradient_state.dataloader_references = references  # a property: assign, not fill
        gradient_state._set_sync_gradients(sync_gradients)


def _generators(loader) -> list[torch.Generator]:
    """Random generators of a data loader's own, which its samplers may hold."""
    found, waiting, seen = [], [loader], set()
    while waiting:
        owner = waiting.pop()
        if owner is None or id(owner) in seen:
            continue
        seen.add(id(owner))
        if isinstance(owner, torch.Generator):
            found.append(owner)
            continue
        for name in ("base_dataloader", "batch_sampler", "sampler", "generator"):
            waiting.append(getattr(owner, name, None))
    return found


class _PlainState:
    """The attributes of an object that are numbers, strings, tensors in containers, and so on."""

    def __init__(
        self,
        owner,
        kinds: tuple = (*_SCALARS, dict, list, set, tuple, deque),
        leave_out: tuple[str, ...] = (),
    ) -> None:
        self.attributes = getattr(owner, "__dict__", {})
        self.names = set(self.attributes)
        self.saved = {
            name: copy.deepcopy(value)
            for name, value in self.attributes.items()
            if name not in leave_out and isinstance(value, kinds) and _is_plain(value)
        }

    def restore(self) -> None:
        attributes = self.attributes
        for name in set(attributes) - self.names:
            if _is_plain(attributes[name]):
                del attributes[name]
        for name, old in self.saved.items():
            current = attributes.get(name)
            # In place where possible: others may hold the same container.
            if isinstance(old, (dict, set)) and type(current) is type(old):
                current.clear()
                current.update(old)
            elif isinstance(old, (list, deque)) and type(current) is type(old):
                current.clear()
                current.extend(old)
            else:
                attributes[name] = old


def _is_plain(value) -> bool:
    if isinstance(value, (*_SCALARS, torch.Tensor)):
        return True
    if isinstance(value, Mapping):
        return all(map(_is_plain, value.keys())) and all(map(_is_plain, value.values()))
    if isinstance(value, (list, tuple, set, deque)):
        return all(map(_is_plain, value))
    return False

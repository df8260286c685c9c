"""What SPFT changes in a trainer's own methods, for a class of trainers or for one trainer."""

from __future__ import annotations

import torch
from transformers import Trainer

from ..checkpoints.mixin import CheckpointMixin
from ..errors import SpftError
from ..importance.class_column import add_class_column, calibrates_by_class, hide_classes
from ..optim.choice import SelectedNeuronOptimizerMixin
from ..run_guard.guard import RunGuard
from ..tuner.model import active_spft_adapter, is_selected, spft_layers


class TrainerMethods(SelectedNeuronOptimizerMixin, CheckpointMixin):
    """The trainer's methods that SPFT adds to; they call the trainer's own by `super()`.

    Attributes:
        run_guard: ends the run where a process dies, hangs or differs.
        reference_is_too_early: TRL has computed a reference before its neurons were selected.
        class_mistake: why the rows of the data have no classes; a run that selects by them ends by
            it, one that resumes does not need them.
    """

    run_guard: RunGuard | None = None
    reference_is_too_early = False
    class_mistake: SpftError | None = None

    def train(self, *args, **kwargs):
        """As the trainer's."""
        try:
            adapter_name = active_spft_adapter(self.model)
        except SpftError:
            pass  # SpftCallback says so when training begins
        else:
            _keep_deltas_wide(self.model, adapter_name)
            config = self.model.peft_config[adapter_name]
            if calibrates_by_class(config) and not is_selected(self.model, adapter_name):
                hide_classes(self.model)
                try:  # before the data loader is made
                    add_class_column(self, config.class_field)
                except SpftError as error:
                    self.class_mistake = error
        return super().train(*args, **kwargs)


def give_methods(trainer: Trainer, methods: type[TrainerMethods] = TrainerMethods) -> None:
    """Let one trainer have these methods, by a class of its own that is made from its class."""
    if not isinstance(trainer, TrainerMethods):
        kind = type(trainer)
        # Methods that others have put into the trainer itself would stand before ours.
        put_in = [
            n for n, value in vars(trainer).items() if callable(value) and hasattr(methods, n)
        ]
        theirs = {name: staticmethod(vars(trainer).pop(name)) for name in put_in}
        names = {"__module__": kind.__module__, "__qualname__": kind.__qualname__}
        if theirs:
            kind = type(kind.__name__, (kind,), {**theirs, **names})
        trainer.__class__ = type(kind.__name__, (methods, kind), names)
    if trainer.run_guard is None:
        trainer.run_guard = RunGuard(trainer)
        trainer.add_callback(trainer.run_guard)
        trainer.reference_is_too_early = _reference_is_too_early(trainer)


def _keep_deltas_wide(model, adapter_name: str) -> None:
    """Over a quantised base TRL makes what is trained bf16; deltas are fp32 there as elsewhere."""
    for layer in spft_layers(model, adapter_name).values():
        weight = layer.spft_delta[adapter_name].weight
        if not layer.has_dense_weight and weight.dtype != torch.float32:
            weight.data = weight.data.float()


def _reference_is_too_early(trainer: Trainer) -> bool:
    """Whether TRL has computed a reference that lacks rows which training will start from."""
    if not getattr(trainer, "precompute_ref_logps", False):
        return False
    adapter_name = active_spft_adapter(trainer.model)
    starts_from_checkpoint = trainer.model.peft_config[adapter_name].anchor == "checkpoint"
    return starts_from_checkpoint and not is_selected(trainer.model, adapter_name)

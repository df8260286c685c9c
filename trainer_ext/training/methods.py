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
    """

    run_guard: RunGuard
    reference_is_too_early: bool

    def train(self, *args, **kwargs):
        """As the trainer's.

        Raises:
            SpftError: the model, the data or the checkpoint do not allow it.
        """
        if self.reference_is_too_early:
            raise SpftError(
                "precompute_ref_log_probs is set, but over a quantised base the reference has the "
                "original rows of neurons that were not selected yet; drop it, or set `quant_init` "
                "to 'none'"
            )
        try:
            adapter_name = active_spft_adapter(self.model)
        except SpftError:
            pass  # SpftCallback says so when training begins
        else:
            _keep_deltas_wide(self.model, adapter_name)
            config = self.model.peft_config[adapter_name]
            if calibrates_by_class(config) and not is_selected(self.model, adapter_name):
                hide_classes(self.model)
                add_class_column(self, config.class_field)
        return super().train(*args, **kwargs)


def give_methods(trainer: Trainer, methods: type[TrainerMethods] = TrainerMethods) -> None:
    """Let one trainer have these methods, by a class of its own that is made from its class."""
    if not isinstance(trainer, TrainerMethods):
        kind = type(trainer)
        trainer.__class__ = type(kind.__name__, (methods, kind), {"__module__": __name__})
    if not hasattr(trainer, "run_guard"):
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

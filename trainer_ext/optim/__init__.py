"""AdamW for the parameters that SPFT trains, and the choice of it for a trainer."""

from .adamw import SelectedNeuronAdamW
from .choice import SelectedNeuronOptimizerMixin, selected_neuron_optimizer

__all__ = [
    "SelectedNeuronAdamW",
    "SelectedNeuronOptimizerMixin",
    "selected_neuron_optimizer",
]

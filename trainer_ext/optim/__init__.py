"""AdamW for the parameters that SPFT trains, and the choice of it for a trainer."""

from .adamw import SelectedNeuronAdamW
from .choice import selected_neuron_optimizer, use_selected_neuron_optimizer

__all__ = [
    "SelectedNeuronAdamW",
    "selected_neuron_optimizer",
    "use_selected_neuron_optimizer",
]

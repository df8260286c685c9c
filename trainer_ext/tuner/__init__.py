"""SPFT as a PEFT method: the layer, the model that places it, and its registration."""

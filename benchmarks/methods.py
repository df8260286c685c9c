"""The methods whose training steps are compared, each built and ready to run."""

from __future__ import annotations

from collections.abc import Callable

import torch
from peft import get_peft_model
from peft.optimizers import create_lorafa_optimizer
from peft_adapters import ADAPTERS, nearest_rank
from torch import nn
from workload import Workload

from trainer_ext import (
    SelectedNeuronAdamW,
    SpftConfig,
    select_neurons,
    trained_parameters,
    write_through,
)

LEARNING_RATE = 1e-3


class UnavailableError(Exception):
    """A method cannot run on this machine; the message says why."""


class Method:
    """A method ready to run.

    Attributes:
        trainable: the parameters that its steps change.
        note: what the table says beside its name.
        parts: name -> parts of `update` that can be run by themselves, for the profile.
    """

    def __init__(
        self,
        model: nn.Module,
        work: Workload,
        optimizer: torch.optim.Optimizer | None = None,
        note: str = "",
    ) -> None:
        self.model, self.optimizer, self.note = model, optimizer, note
        self.parts: dict[str, Callable[[], object]] = {}
        self.trainable = [p for p in model.parameters() if p.requires_grad]
        self._run = torch.compile(model) if work.compile else model
        self._batch, self._autocast = work.batch(), work.autocast

    def step(self) -> None:
        """One training step; it leaves no gradients behind."""
        self.backward(self.forward())
        self.update()

    def forward(self) -> torch.Tensor:
        """The batch's loss."""
        with self._autocast():
            return self._run(**self._batch).loss

    def backward(self, loss: torch.Tensor) -> None:
        loss.backward()

    def update(self) -> None:
        """The optimizer's part of a step."""
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def build_frozen(work: Workload) -> Method:
    """Forward and backward to the embeddings' output, with nothing to train."""
    model = work.shared_model()
    model.enable_input_require_grads()
    return Method(model, work)


def build_spft_write_through(work: Workload) -> Method:
    """SPFT with the selected rows of the base weights holding W + delta."""
    return _build_spft(work, work.base_model(), "write_through")


def build_spft_delta(work: Workload) -> Method:
    """SPFT that adds the selected neurons' outputs and leaves the base weights as they are."""
    return _build_spft(work, work.shared_model(), "delta")


def build_spft_8bit(work: Workload) -> Method:
    """As `spft_write_through`, with AdamW's state in 8 bits."""
    try:
        import bitsandbytes  # noqa: F401  # the 8-bit state needs it
    except Exception as error:  # a broken installation fails in many ways
        raise UnavailableError(f"bitsandbytes cannot be imported: {error}") from None
    return _build_spft(work, work.base_model(), "write_through", state_bits=8)


def _build_spft(work: Workload, base: nn.Module, forward: str, state_bits: int = 32) -> Method:
    model = get_peft_model(base, SpftConfig(r=work.r, importance="magnitude", forward=forward))
    select_neurons(model)
    optimizer = SelectedNeuronAdamW(
        trained_parameters(model), lr=LEARNING_RATE, fused=True, state_bits=state_bits
    )
    method = Method(model, work, optimizer, f"r = {work.r}")
    if forward == "write_through":
        write_through(model)  # a compiled forward does not see to it
        method.parts["row rewriting"] = lambda: write_through(model)
    return method


def build_adapter(name: str, work: Workload) -> Method:
    """A PEFT method on SPFT's layers, at the rank whose number of parameters is nearest."""
    adapter = ADAPTERS[name]
    rank = nearest_rank(adapter, list(work.layers.values()), work.budget)
    config = adapter.config(rank, list(work.layers))
    model = get_peft_model(work.shared_model(), config)
    if name == "lora_fa":
        optimizer = create_lorafa_optimizer(
            model, r=rank, lora_alpha=config.lora_alpha, lr=LEARNING_RATE
        )
    else:
        optimizer = _adamw(model)
    return Method(model, work, optimizer, f"rank {rank}")


def build_full(work: Workload) -> Method:
    """Full fine-tuning: every parameter, its AdamW state in the model's dtype."""
    model = work.base_model()
    return Method(model, work, _adamw(model))


def _adamw(model: nn.Module) -> torch.optim.AdamW:
    trainable = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trainable, lr=LEARNING_RATE, fused=True)  # there is one on CPUs too


# A method is one function here.
METHODS: dict[str, Callable[[Workload], Method]] = {
    "frozen": build_frozen,
    "spft_write_through": build_spft_write_through,
    "spft_delta": build_spft_delta,
    "spft_8bit": build_spft_8bit,
    "lora": lambda work: build_adapter("lora", work),
    "dora": lambda work: build_adapter("dora", work),
    "lora_fa": lambda work: build_adapter("lora_fa", work),
    "miss": lambda work: build_adapter("miss", work),
    "shira": lambda work: build_adapter("shira", work),
    "full": build_full,
}

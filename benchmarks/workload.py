"""The model shapes, random weights and random batches that the benchmarks measure on."""

from __future__ import annotations

import argparse
import copy
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trainer_ext import SpftConfig
from trainer_ext.tuner.targets import default_target_modules

SEED = 0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
ATTENTIONS = ("eager", "sdpa", "flash_attention_2")


@dataclass(frozen=True)
class Size:
    """A Llama shape, and the `r` at which SPFT trains about 5 % of its weights."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int
    tied: bool
    r: int


SIZES = {
    "tiny": Size(64, 128, 2, 4, 2, 256, True, 8),
    "50m": Size(512, 1376, 12, 8, 4, 32000, True, 48),  # no published model
    "135m": Size(576, 1536, 30, 9, 3, 49152, True, 48),  # SmolLM2-135M
    "1b": Size(2048, 8192, 16, 32, 8, 128256, True, 192),  # Llama-3.2-1B
    "3b": Size(3072, 8192, 28, 24, 8, 128256, True, 216),  # Llama-3.2-3B
    "8b": Size(4096, 14336, 32, 32, 8, 128256, False, 320),  # Llama-3.1-8B
}


@dataclass
class Workload:
    """What every method is given: the same initial model and the same batch."""

    size: Size
    dtype: torch.dtype
    device: torch.device
    seq_len: int
    batch_size: int
    r: int
    checkpointing: bool
    attention: str = "sdpa"
    compile: bool = False

    @cached_property
    def layers(self) -> dict[str, tuple[int, int]]:
        """(d_in, d_out) of the linear layers that every PEFT method trains, by their names."""
        model = replace(self, device=torch.device("meta")).base_model()
        layers = {name: model.get_submodule(name) for name in default_target_modules(model)}
        return {name: (layer.in_features, layer.out_features) for name, layer in layers.items()}

    @property
    def budget(self) -> int:
        """Number of parameters that SPFT trains.

        Raises:
            SpftError: `r` is larger than a layer.
        """
        config = SpftConfig(r=self.r)
        return sum(
            config.neurons_of(name, d_out) * d_in for name, (d_in, d_out) in self.layers.items()
        )

    @property
    def trained_share(self) -> float:
        """SPFT's share of the weights of the layers that it trains."""
        return self.budget / sum(d_in * d_out for _, (d_in, d_out) in self.layers.items())

    def autocast(self) -> torch.autocast:
        """What forwards run in: bf16 weights as in a trainer with `bf16: true`, under autocast."""
        on = self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=on)

    def base_model(self) -> LlamaForCausalLM:
        """Build the base model anew, in train mode; the same weights at every call."""
        size = self.size
        config = LlamaConfig(
            hidden_size=size.hidden,
            intermediate_size=size.intermediate,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            num_key_value_heads=size.kv_heads,
            vocab_size=size.vocab,
            tie_word_embeddings=size.tied,
            max_position_embeddings=max(8192, self.seq_len),
            use_cache=False,
        )
        torch.manual_seed(SEED)
        with torch.device(self.device):
            model = LlamaForCausalLM._from_config(
                config, dtype=self.dtype, attn_implementation=self.attention
            )
        if self.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train()

    def shared_model(self) -> LlamaForCausalLM:
        """The base model with modules of its own over frozen parameters shared by all such models.

        For methods that write to no base weight: all of them together hold one copy.
        """
        base = self._shared_base
        return copy.deepcopy(base, memo={id(p): p for p in base.parameters()})

    @cached_property
    def _shared_base(self) -> LlamaForCausalLM:
        return self.base_model().requires_grad_(False)

    def batch(self) -> dict[str, torch.Tensor]:
        """Return random tokens, each also a label."""
        generator = torch.Generator().manual_seed(SEED)
        shape = (self.batch_size, self.seq_len)
        tokens = torch.randint(self.size.vocab, shape, generator=generator).to(self.device)
        return {"input_ids": tokens, "labels": tokens}

    @classmethod
    def of(cls, args: argparse.Namespace, **more) -> Workload:
        """The workload that the options of `measuring.add_options` ask for.

        Args:
            more: values of further fields.
        """
        return cls(
            size=SIZES[args.size],
            dtype=DTYPES[args.dtype],
            device=torch.device(args.device),
            seq_len=args.seq_len,
            batch_size=args.batch_size,
            r=args.r,
            checkpointing=args.checkpointing,
            attention=args.attention,
            **more,
        )

"""The model shapes, random weights and random batches that the benchmarks measure on."""

from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from transformers import LlamaConfig, LlamaForCausalLM

SEED = 0
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


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
    "135m": Size(576, 1536, 30, 9, 3, 49152, True, 48),  # SmolLM2-135M
    "1b": Size(2048, 8192, 16, 32, 8, 128256, True, 192),  # Llama-3.2-1B
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
            model = LlamaForCausalLM._from_config(config, dtype=self.dtype)
        if self.checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        return model.train()

    def batch(self) -> dict[str, torch.Tensor]:
        """Return random tokens, each also a label."""
        generator = torch.Generator().manual_seed(SEED)
        shape = (self.batch_size, self.seq_len)
        tokens = torch.randint(self.size.vocab, shape, generator=generator).to(self.device)
        return {"input_ids": tokens, "labels": tokens}

    @classmethod
    def of(cls, args: argparse.Namespace) -> Workload:
        """The workload that the options of `measuring.add_options` ask for."""
        return cls(
            size=SIZES[args.size],
            dtype=DTYPES[args.dtype],
            device=torch.device(args.device),
            seq_len=args.seq_len,
            batch_size=args.batch_size,
            r=args.r,
            checkpointing=args.checkpointing,
        )

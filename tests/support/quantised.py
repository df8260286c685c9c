"""Tiny models on disk that bitsandbytes can quantise, and their 4- and 8-bit copies."""

from __future__ import annotations

from pathlib import Path

import torch
from tiny_models import CONFIGS
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

BITS = (4, 8)


def save_base(
    folder: Path,
    architecture: str = "llama",
    dtype=torch.bfloat16,
    tie_word_embeddings: bool = False,
    **save,
) -> Path:
    """A checkpoint whose layers have inputs in multiples of 64, as 4-bit blocks want them."""
    config = CONFIGS[architecture].to_dict() | {"tie_word_embeddings": tie_word_embeddings}
    if architecture == "gpt2":
        config |= {"n_embd": 64, "n_inner": 128}
        config |= {"attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0}
    else:
        config |= {"hidden_size": 64, "intermediate_size": 128}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(type(CONFIGS[architecture])(**config)).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    model.save_pretrained(folder, **save)
    return folder


def quantised(folder: Path, bits: int, dtype=torch.float32):
    """The checkpoint in 4 bits (NF4, double quantisation) or 8, computing in `dtype`."""
    if bits == 4:
        config = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )
    else:
        config = BitsAndBytesConfig(load_in_8bit=True)
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=dtype)


def dense(folder: Path, dtype=torch.float32):
    """The checkpoint as it is."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)

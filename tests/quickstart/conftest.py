"""Loads the quickstart's scripts, which are no package, by their paths; makes tiny models."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUICKSTART = Path(__file__).resolve().parents[2] / "quickstart"


@pytest.fixture(scope="session")
def load_script() -> Callable[[str], ModuleType]:
    """Return a function that loads ``quickstart/<name>.py`` as a module."""

    def load(name: str) -> ModuleType:
        path = QUICKSTART / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"quickstart_{name}", path)
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module  # where dataclasses look their module up
        spec.loader.exec_module(module)
        return module

    return load


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    """Return a byte-level tokenizer with the faults of one read from GGUF."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *alphabet, "12"]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=[("1", "2")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token="<|im_start|>",
        additional_special_tokens=["<|im_end|>"],
        clean_up_tokenization_spaces=True,
    )
    assert tokenizer.tokenize("12") == ["12"]
    return tokenizer


@pytest.fixture
def save_tiny_model() -> Callable[..., None]:
    """Return a function that saves a random model, its last norm filled where a value is given."""

    def save(tokenizer: PreTrainedTokenizerBase, folder: Path, fill: float | None = None) -> None:
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            tie_word_embeddings=True,
        )
        model = LlamaForCausalLM(config)
        if fill is not None:
            torch.nn.init.constant_(model.model.norm.weight, fill)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)

    return save

"""Tiny random models and a byte tokenizer, made on the spot: no test needs a model hub."""

from __future__ import annotations

import copy

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    GemmaConfig,
    GPT2Config,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

VOCAB = 260
_COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # The usual 0.02 leaves a model this narrow with attention gradients near rounding noise.
    "initializer_range": 0.2,
    "pad_token_id": 256,
    "bos_token_id": 257,
    "eos_token_id": 258,
}
CONFIGS = {
    "llama": LlamaConfig(**_COMMON, tie_word_embeddings=True),
    "llama_bias": LlamaConfig(**_COMMON, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**_COMMON),
    "gemma": GemmaConfig(**_COMMON, head_dim=8),
    "mistral": MistralConfig(**_COMMON, sliding_window=None),
    "gpt2": GPT2Config(
        vocab_size=VOCAB,
        n_embd=32,
        n_inner=48,
        n_layer=2,
        n_head=4,
        n_positions=128,
        initializer_range=0.2,
        pad_token_id=256,
        bos_token_id=257,
        eos_token_id=258,
    ),
}
# One attention and one MLP layer of every architecture, for tests that need names.
LAYERS = {
    "gpt2": ("transformer.h.0.attn.c_attn", "transformer.h.1.mlp.c_proj"),
    None: ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"),
}


def tiny_model(architecture: str = "llama", seed: int = 0, dtype=torch.float32):
    """A freshly initialised model with biases that are not zero, the same for the same seed."""
    torch.manual_seed(seed)
    config = copy.deepcopy(CONFIGS[architecture])  # models keep theirs, and tests change it
    model = AutoModelForCausalLM.from_config(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.5)
    return model


def wide_model() -> LlamaForCausalLM:
    """Weights that are large beside the activations of `few_tokens`, for counting bytes."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=64,
            hidden_size=384,
            intermediate_size=1024,
            num_hidden_layers=2,
            num_attention_heads=4,
        )
    )


def few_tokens() -> list[dict[str, torch.Tensor]]:
    """Two batches of two rows of three tokens."""
    tokens = torch.arange(6).view(2, 3)
    return [{"input_ids": tokens, "labels": tokens}] * 2


def batch(
    seed: int = 0, rows: int = 3, length: int = 16, padding: bool = False, device="cpu"
) -> dict[str, torch.Tensor]:
    """Random tokens with labels; with `padding`, rows of different lengths."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, 256, (rows, length), generator=generator)
    mask = torch.ones_like(tokens)
    if padding:
        for row in range(1, rows):
            mask[row, length - 3 * row :] = 0
    data = {
        "input_ids": torch.where(mask.bool(), tokens, 256),
        "attention_mask": mask,
        "labels": torch.where(mask.bool(), tokens, -100),
    }
    return {key: value.to(device) for key, value in data.items()}


def packed_batch(seed: int = 0, lengths: tuple[int, ...] = (7, 5, 9)) -> dict:
    """Several sequences in one row, told apart by their position ids, as sample packing does."""
    tokens = batch(seed, rows=1, length=sum(lengths))["input_ids"]
    labels = tokens.clone()
    starts = torch.tensor([0, *lengths]).cumsum(0)[:-1]
    labels[0, starts] = -100
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    # transformers looks for packed sequences only where no cache is kept
    return {
        "input_ids": tokens,
        "position_ids": positions,
        "labels": labels,
        "use_cache": False,
    }


def dataset(rows: int = 32, length: int = 24, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """Rows for a Trainer; every row's first token tells which row it is."""
    data = batch(seed, rows=rows, length=length)
    data["input_ids"][:, 0] = torch.arange(rows)
    return [{"input_ids": t, "labels": t.clone()} for t in data["input_ids"]]


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """Every byte a token, and pad, bos, eos after them: VOCAB ids with one to spare."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    vocabulary |= {"<pad>": 256, "<bos>": 257, "<eos>": 258, "<unk>": 259}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
    )
    fast.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}<eos>\n"
        "{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"
    )
    return fast

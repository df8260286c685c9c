"""Axolotl keys that SPFT does not support: refused with the reason, never ignored."""

from __future__ import annotations

from collections.abc import Callable

from trainer_ext import SpftError

from .class_column import calibrates_by_class
from .preferences import METHODS, WITH_REFERENCE

_NOT_YET = "is not supported with adapter: prune_spft yet"


def _size_above_one(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 1


# key -> (when it is refused, why and what to do)
_REFUSED: dict[str, tuple[Callable[[object], bool], str]] = {
    "gptq": (bool, f"a GPTQ base {_NOT_YET}; use the unquantised model"),
    "qat": (bool, f"quantisation-aware training {_NOT_YET}; drop it"),
    "quantize_moe_experts": (bool, f"a quantised base {_NOT_YET}; drop it"),
    "relora": (bool, "ReLoRA restarts re-initialise LoRA factors, which SPFT has none of; drop it"),
    "loraplus_lr_ratio": (bool, "LoRA+ sets the rates of LoRA's A and B; drop it"),
    "lora_mlp_kernel": (bool, "it computes LoRA's products and would skip SPFT's; drop it"),
    "lora_qkv_kernel": (bool, "it computes LoRA's products and would skip SPFT's; drop it"),
    "lora_o_kernel": (bool, "it computes LoRA's products and would skip SPFT's; drop it"),
    "lora_embedding_kernel": (bool, "it computes LoRA's products; drop it"),
    "lora_target_parameters": (bool, "SPFT trains linear layers, not bare parameters; drop it"),
    "lora_fp32_gradients": (bool, "SPFT's deltas have fp32 gradients by default; drop it"),
    "nf4_backend": (
        lambda value: value != "bitsandbytes",
        "SPFT trains over bitsandbytes' 4-bit weights; drop it",
    ),
    "nvfp4_merge_aware": (bool, "it trains LoRA's factors by their merged weights; drop it"),
    "peft_use_dora": (bool, "DoRA is a variant of LoRA; drop it"),
    "peft_layer_replication": (bool, f"layer replication {_NOT_YET}; drop it"),
    "peft_trainable_token_indices": (
        bool,
        f"training single tokens {_NOT_YET}; use lora_modules_to_save for the embeddings",
    ),
    "lr_groups": (bool, f"a learning rate for each group {_NOT_YET}; use learning_rate alone"),
    "fsdp": (bool, "FSDP1 is not supported with adapter: prune_spft; use fsdp_config instead"),
    "tensor_parallel_size": (_size_above_one, f"tensor parallelism {_NOT_YET}; set it to 1"),
    "context_parallel_size": (_size_above_one, f"context parallelism {_NOT_YET}; set it to 1"),
    "sequence_parallel_degree": (_size_above_one, f"sequence parallelism {_NOT_YET}; set it to 1"),
    "dp_replicate_size": (_size_above_one, f"hybrid sharding {_NOT_YET}; set it to 1"),
    "expert_parallel_size": (_size_above_one, f"expert parallelism {_NOT_YET}; set it to 1"),
    "rl": (
        lambda value: bool(value) and value not in METHODS,
        f"it is not supported with adapter: prune_spft; allowed: {', '.join(METHODS)}",
    ),
    "rl_adapter_ref_model": (
        bool,
        "SPFT's reference is the model itself with the adapter off; drop it",
    ),
    "unfrozen_parameters": (
        bool,
        "it would train the base weights that SPFT keeps frozen; use lora_modules_to_save",
    ),
}


def refuse_unsupported(cfg: dict) -> None:
    """Check a raw YAML with `adapter: prune_spft`.

    Raises:
        SpftError: the first key that is not supported, its value and the reason.
    """
    for key, (is_refused, reason) in _REFUSED.items():
        value = cfg.get(key)
        if value is not None and is_refused(value):
            raise SpftError(f"{key} is {value!r}: {reason}")
    _refuse_unsupported_fsdp(cfg)
    _refuse_unsupported_with_rl(cfg)
    _refuse_unsupported_quantisation(cfg)
    if cfg.get("merge_method") == "memory_efficient":
        raise SpftError(
            "merge_method is 'memory_efficient': Axolotl's shard-wise merge knows LoRA files only; "
            "drop merge_method (SPFT uses legacy, which merges exactly)"
        )


def _refuse_unsupported_with_rl(cfg: dict) -> None:
    """Keys that Axolotl refuses by a traceback, or that TRL, which wraps the model, ignores."""
    rl = cfg.get("rl")
    if not rl:
        return
    if cfg.get("sample_packing"):
        raise SpftError(
            f"sample_packing is {cfg['sample_packing']!r} with rl: {rl}: preference pairs are not "
            "packed; drop it"
        )
    if rl == "simpo" and cfg.get("simpo_gamma") is None:
        raise SpftError(
            "simpo_gamma is not set with rl: simpo, and Axolotl has no default for it; set "
            "simpo_gamma: 0.5"
        )
    if rl in WITH_REFERENCE and cfg.get("peft_autocast_adapter_dtype") is False:
        raise SpftError(
            f"peft_autocast_adapter_dtype is False with rl: {rl}: TRL wraps the model and "
            "chooses the deltas' dtype itself; drop it"
        )


def _refuse_unsupported_quantisation(cfg: dict) -> None:
    bits = [key for key in ("load_in_4bit", "load_in_8bit") if cfg.get(key)]
    if len(bits) == 2:
        raise SpftError("load_in_4bit and load_in_8bit are both True; keep one")
    if not bits:
        if cfg.get("spft_quant_init") and not cfg.get("merge_lora"):
            raise SpftError(
                f"spft_quant_init is {cfg['spft_quant_init']!r} but the base is not quantised; "
                "drop it, or set load_in_4bit: true"
            )
        return
    if cfg.get("spft_forward") == "write_through":
        raise SpftError(
            f"spft_forward is 'write_through' with {bits[0]}: a quantised weight cannot hold an "
            "update; drop spft_forward"
        )
    fsdp = cfg.get("fsdp_config") or {}
    if fsdp.get("cpu_ram_efficient_loading"):
        raise SpftError(
            f"fsdp_config.cpu_ram_efficient_loading is True with {bits[0]}: processes that load "
            "nothing have no values to quantise; set it to false"
        )
    if fsdp and cfg.get("rl"):
        raise SpftError(
            f"{bits[0]} is True with rl: {cfg['rl']} and FSDP2, which Axolotl does not allow; use "
            "DeepSpeed"
        )
    loftq = (cfg.get("peft") or {}).get("loftq_config")
    if loftq:
        raise SpftError(
            f"peft.loftq_config is {dict(loftq)!r}: LoftQ initialises LoRA's factors; drop it (the "
            "trained neurons start from their original rows, see spft_quant_init)"
        )


def _refuse_unsupported_fsdp(cfg: dict) -> None:
    fsdp = cfg.get("fsdp_config")
    if not isinstance(fsdp, dict):
        return
    version = cfg.get("fsdp_version") or fsdp.get("fsdp_version")
    if str(version) != "2":
        raise SpftError(
            f"fsdp_version is {version!r}: FSDP1 is not supported with adapter: prune_spft; "
            "set fsdp_version: 2"
        )
    if fsdp.get("offload_params"):
        raise SpftError(
            f"fsdp_config.offload_params is {fsdp['offload_params']!r}: FSDP2's parameter offload "
            f"{_NOT_YET}; drop it, or offload by DeepSpeed ZeRO-3"
        )


_TOKENISED = ("input_ids", "attention_mask", "labels", "position_ids", "length")


def check_classes(cfg: dict) -> None:
    """Check what `spft_importance: quantile_mean` needs of a raw YAML.

    Raises:
        SpftError: the class column is not named, or rows and classes would not go together.
    """
    if not calibrates_by_class(cfg):
        return
    if not cfg.get("spft_class_field"):
        raise SpftError(
            "spft_importance is 'quantile_mean' but spft_class_field is not set; name the dataset "
            "column that holds each row's class"
        )
    if cfg["spft_class_field"] in _TOKENISED:
        raise SpftError(
            f"spft_class_field is {cfg['spft_class_field']!r}, a column that tokenisation makes "
            "itself; rename the column in the dataset"
        )
    for key, reason, mend in (
        ("rl", "preference datasets lose their other columns", "drop it"),
        ("reward_model", "the rows of a batch are not those of the dataset", "drop it"),
        ("process_reward_model", "the classes get lost", "drop it"),
        (
            "sample_packing",
            "one row would hold several sequences, each of its own class",
            "drop it",
        ),
        ("pretraining_dataset", "the classes of a stream cannot be known", "use datasets"),
        ("streaming", "the classes of a stream cannot be known", "drop it"),
    ):
        if cfg.get(key):
            raise SpftError(
                f"{key} is {cfg[key]!r} with spft_importance: quantile_mean: {reason}; {mend}, "
                "or use another spft_importance (group_taylor)"
            )

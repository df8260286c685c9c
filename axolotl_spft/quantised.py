"""A base in 4 or 8 bits, which Axolotl itself gives to `adapter: qlora` and `lora` alone.

What those get is asked of Axolotl's own code, so it is the same by construction, with its
exceptions for single model types and for engines.
"""

from __future__ import annotations

from types import SimpleNamespace

from axolotl.loaders.model import ModelLoader
from axolotl.utils.dict import DictDefault


def is_quantised(cfg) -> bool:
    """Whether a configuration, raw or validated, loads the base in 4 or 8 bits."""
    return bool(cfg.get("load_in_4bit") or cfg.get("load_in_8bit"))


def leave_room(cfg: dict) -> None:
    """Put a place for the quantisation config in a raw YAML's `model_kwargs`.

    No hook sees what a model is loaded with, but the values in `model_kwargs` are passed on as they
    stand, and `fill_in` comes before they are used.
    """
    key = "model_kwargs" if cfg.get("model_kwargs") else "overrides_of_model_kwargs"
    cfg[key] = {"quantization_config": {}, **(cfg.get(key) or {})}


def fill_in(cfg) -> None:
    """Fill that place, once dtypes and engine are known."""
    loader = _loader(cfg)
    loader.model_config, loader.model_kwargs = None, {}
    ModelLoader._set_quantization_config(loader)
    config = loader.model_kwargs["quantization_config"].to_dict()
    place = cfg.overrides_of_model_kwargs["quantization_config"]
    if not place:
        place.update({key: v for key, v in config.items() if not key.startswith("_")})


def prepare(cfg, model) -> None:
    """Axolotl's kbit preparation of a quantised model: frozen, the rest in fp32, input gradients.

    Axolotl then brings norms and embeddings into the compute dtype, for every adapter.
    """
    loader = _loader(cfg)
    loader.model = model
    ModelLoader._prepare_model_for_quantization(loader)


def _loader(cfg) -> SimpleNamespace:
    """Axolotl's loader, as far as what it does to quantised models looks at it."""
    sharded = bool(cfg.fsdp_config)
    return SimpleNamespace(
        cfg=DictDefault({**cfg, "adapter": "qlora" if cfg.load_in_4bit else "lora"}),
        is_fsdp_enabled=sharded,
        is_qlora_and_fsdp_enabled=sharded and bool(cfg.load_in_4bit),
    )

"""Random generators that are a function of what they are for."""

from __future__ import annotations

import hashlib

import torch


def generator_for(*key: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator seeded by the parts of `key` alone (as strings)."""
    digest = hashlib.sha256(":".join(map(str, key)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))

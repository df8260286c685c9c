"""Random numbers that are a function of what they are for, so that nobody has to store them."""

from __future__ import annotations

import hashlib

import torch

from ..distributed import BLOCK_ROWS


def generator_for(*key: object, device: torch.device | str = "cpu") -> torch.Generator:
    """A random generator seeded by the parts of `key` alone (as strings)."""
    digest = hashlib.sha256(":".join(map(str, key)).encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "big"))


def weight_noise(
    key: tuple, chunk: int, rows: int, columns: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Standard normal noise of one chunk of a stored weight's rows, fp32.

    Every chunk has a generator of its own, so any range of rows can be made anew by itself.

    Args:
        key: what the noise of the whole weight is a function of.
        chunk: number of the chunk; it begins at row chunk * BLOCK_ROWS.
        rows, columns: shape of the weight as stored.

    Returns:
        (BLOCK_ROWS, columns), fewer rows for the last chunk.
    """
    count = min(BLOCK_ROWS, rows - chunk * BLOCK_ROWS)
    generator = generator_for(*key, chunk, device=device)
    return torch.randn(count, columns, generator=generator, device=device)

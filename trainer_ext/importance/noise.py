"""Noise of a weight that is a function of what it is for, so that nobody has to store it."""

from __future__ import annotations

import torch

from ..seeding import generator_for

# Elements that one generator fills: few enough to bound memory, many enough to keep a GPU busy.
CHUNK_ELEMENTS = 2**22


def chunk_rows(columns: int) -> int:
    """Rows of a stored weight with so many columns that make up a chunk of noise."""
    return max(1, CHUNK_ELEMENTS // columns)


def weight_noise(
    key: tuple, chunk: int, rows: int, columns: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Standard normal noise of one chunk of a stored weight's rows, fp32.

    Every chunk has a generator of its own, so any range of rows can be made anew by itself.

    Args:
        key: what the noise of the whole weight is a function of.
        chunk: number of the chunk; it begins at row chunk * chunk_rows(columns).
        rows, columns: shape of the weight as stored.

    Returns:
        (chunk_rows(columns), columns), fewer rows for the last chunk.
    """
    count = min(chunk_rows(columns), rows - chunk * chunk_rows(columns))
    generator = generator_for(*key, chunk, device=device)
    return torch.randn(count, columns, generator=generator, device=device)

"""Derive preference pairs from the quickstart's data: the right docstring against a sibling's.

No human has compared anything. For a function the docstring that its authors wrote is *chosen*, and
that of another function of the same module, as near in length as there is one, is *rejected*: what
is learnt is to tell a function's own description from one in the same style and vocabulary.
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable
from pathlib import Path

import prepare_data

# Short ones, so that a pair's two answers with their prompts take 300 tokens or so.
MAX_SOURCE_CHARACTERS = 350
MAX_DOCSTRING_CHARACTERS = 120
MAX_TRAIN_PAIRS = 1000
MAX_HELD_OUT_PAIRS = 240


def preference_pairs(pairs: Iterable[prepare_data.Pair]) -> list[dict]:
    """Conversations as TRL reads them: prompt, chosen and rejected messages.

    A function whose module has no other is left out.
    """
    by_module: dict[str, list[prepare_data.Pair]] = {}
    for pair in pairs:
        by_module.setdefault(pair.module, []).append(pair)
    rows = []
    for members in by_module.values():
        for pair in members:
            siblings = [other for other in members if other is not pair]
            if not siblings:
                continue
            # ties by a fixed order of their own, else one sibling would serve many
            nearest = min(
                siblings,
                key=lambda other: (
                    abs(len(other.docstring) - len(pair.docstring)),
                    prepare_data.stable_hash(pair.source + other.docstring),
                ),
            )
            rows.append(_row(pair, nearest.docstring))
    rows.sort(key=lambda row: prepare_data.stable_hash(row["prompt"][0]["content"]))
    return rows


def _row(pair: prepare_data.Pair, rejected: str) -> dict:
    prompt = prepare_data.PROMPT.format(source=pair.source)
    return {
        "prompt": [{"role": "user", "content": prompt}],
        "chosen": [{"role": "assistant", "content": pair.docstring}],
        "rejected": [{"role": "assistant", "content": rejected}],
    }


def train_and_held_out(fraction: float = 0.3) -> tuple[list[dict], list[dict]]:
    """Pairs from different top-level modules of the running Python's standard library.

    Args:
        fraction: part of the modules that is held out.
    """
    library = Path(sysconfig.get_path("stdlib"))
    kept: dict[bool, list[prepare_data.Pair]] = {True: [], False: []}
    for pair in prepare_data.collect_pairs(library):
        if len(pair.source) > MAX_SOURCE_CHARACTERS:
            continue
        if len(pair.docstring) > MAX_DOCSTRING_CHARACTERS:
            continue
        kept[prepare_data.stable_hash(pair.module) < fraction * 2**64].append(pair)
    train, held_out = preference_pairs(kept[False]), preference_pairs(kept[True])
    return train[:MAX_TRAIN_PAIRS], held_out[:MAX_HELD_OUT_PAIRS]

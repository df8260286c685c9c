"""Checks of SpftConfig's fields: a value that is not allowed is refused in one line."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

from ..errors import SpftError


def matches_layer(pattern: str, layer: str) -> bool:
    """Whether a layer's name ends with the name or regular expression, as in PEFT's rank_pattern.

    The ending begins at the name's beginning or after a dot.
    """
    return re.match(rf"(.*\.)?({pattern})$", layer) is not None


def check_budget(r: int | None, density: float | None) -> None:
    """Refuse a budget that is contradictory or out of range."""
    if r is not None and density is not None:
        raise SpftError(
            f"`r` is {r} and `density` is {density}, but both set the number of "
            "neurons; keep one of them"
        )
    if r is not None:
        check_positive_int("r", r)
    if density is not None:
        check_share("density", density)


def check_share(key: str, value: object) -> None:
    """Refuse anything but a number in (0, 1] (booleans included)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0.0 < value <= 1.0:
        allowed = "a share of the neurons above 0, up to 1, for example 0.05"
        raise SpftError(field=key, seen=value, allowed=allowed)


def as_numbers(key: str, value: object, check: Callable[[str, object], None]) -> dict | None:
    """Names or patterns with a checked number each, as a plain dict in the given order.

    A plain dict, since subclasses of front ends neither copy nor compare as it does. Pairs are
    accepted too, because patterns are saved so.
    """
    if value is None:
        return None
    try:
        numbers = dict(value)
    except (TypeError, ValueError):
        allowed = "a number for each name, for example down_proj: 8"
        raise SpftError(field=key, seen=value, allowed=allowed) from None
    for name, number in numbers.items():
        try:
            check(key, number)
        except SpftError as error:
            raise error.within(f"for {name!r}") from None
    return numbers


def check_layer_pattern(key: str, pattern: object) -> None:
    """Refuse a key of a pattern field that is no name and no regular expression."""
    try:
        re.compile(pattern)
        matches_layer(pattern, "")  # an expression may be whole alone and broken inside another
    except (TypeError, re.error) as error:
        raise SpftError(
            f"`{key}` has {pattern!r}, which is neither the ending of a layer's name nor a regular "
            f"expression ({error}); mend it"
        ) from None


def check_positive_int(key: str, value: object) -> None:
    """Refuse anything but a whole number of at least 1 (booleans included)."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise SpftError(field=key, seen=value, allowed="a whole number of at least 1")


def check_positive_number(key: str, value: object) -> None:
    """Refuse anything but a finite number above 0 (booleans included)."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0 < value < math.inf:
        raise SpftError(field=key, seen=value, allowed="a number above 0")


def check_pattern(key: str, value: object) -> None:
    """Refuse a string that is not a regular expression."""
    if not isinstance(value, str):
        return
    try:
        re.compile(value)
    except re.error as error:
        raise SpftError(
            f"`{key}` is {value!r}, which is not a regular expression ({error}); "
            "mend it, or give a list of names"
        ) from None


def check_choice(key: str, value: object, allowed) -> None:
    """Refuse a value that is not among `allowed`."""
    if value not in tuple(allowed):
        words = ", ".join(allowed)
        raise SpftError(
            f"`{key}` is {value!r}; allowed: {words}", field=key, seen=value, allowed=words
        )

"""The one exception that a user's mistake raises, and how it is shown."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping

from tqdm import tqdm

_FIELD = re.compile(r"`(\w+)`")


def in_plain_words(message: str, names: Mapping[str, str] | None = None) -> str:
    """A message as users read it: fields in backticks called by their names in the front end."""
    return _FIELD.sub(lambda m: (names or {}).get(m[1], m[1]), message)


class SpftError(ValueError):
    """A mistake in the user's input, described in one line.

    The message names the key or file, what was seen, what is allowed and how to mend it. Front
    ends (the Axolotl plugin, scripts) print it without a traceback. In the source of a message,
    fields of SpftConfig stand in backticks, so that a front end can call them by its own names.

    Args:
        message: the whole line; without it, it is made of the others.
        field: of SpftConfig, whose value is not allowed.
        seen: that value.
        allowed: what it may be, in words.
        mend: what to do, where `allowed` does not say it.

    Attributes:
        field, seen, allowed, mend: as given.
    """

    def __init__(
        self, message: str = "", *, field: str = "", seen=None, allowed: str = "", mend: str = ""
    ) -> None:
        if not message:
            message = f"`{field}` is {seen!r}; allowed is {allowed}" + (mend and f"; {mend}")
        super().__init__(in_plain_words(message).replace("`", ""))
        self._marked = message
        self.field, self.seen, self.allowed, self.mend = field, seen, allowed, mend

    def renamed(self, names: Mapping[str, str]) -> SpftError:
        """The same error with the fields in its message called by other names."""
        message = _FIELD.sub(lambda m: f"`{names.get(m[1], m[1])}`", self._marked)
        return self._said(message, names.get(self.field, self.field))

    def within(self, what: str) -> SpftError:
        """The same error with what it happened to put before its message."""
        return self._said(f"{what}: {self._marked}", self.field)

    def _said(self, message: str, field: str) -> SpftError:
        return SpftError(message, field=field, seen=self.seen, allowed=self.allowed, mend=self.mend)


def show_mistake(error: SpftError) -> None:
    """Print a user's mistake as the last line."""
    # An open bar would share its line with the message and show itself again at exit.
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()
    print(f"axolotl-spft: {error}", file=sys.stderr)

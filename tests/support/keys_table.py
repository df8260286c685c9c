"""The README's table of YAML keys, made from the fields of SpftConfig.

`python tests/support/keys_table.py` writes it into the README.
"""

from __future__ import annotations

import re
from pathlib import Path

from axolotl_spft.args import OPTIONS, YAML_NAMES, default_of

README = Path(__file__).resolve().parents[2] / "README.md"
_TABLE = re.compile(r"(?<=\| key \| default \| meaning \|\n\|---\|---\|---\|\n)(\| .*\|\n)+")


def keys_table() -> str:
    """The rows, one a key."""
    return "".join(f"| `{YAML_NAMES[o.name]}` | {_default(o)} | {_help(o)} |\n" for o in OPTIONS)


def _help(option) -> str:
    text = option.metadata["help"]
    return re.sub(r"`(\w+)`", lambda m: f"`{YAML_NAMES.get(m[1], m[1])}`", text)


def _default(option) -> str:
    text = default_of(option)
    is_word = option.default is None or not isinstance(option.default, str)
    return text if is_word or not text else f"`{text}`"


def in_readme() -> str:
    return _TABLE.search(README.read_text())[0]


if __name__ == "__main__":
    README.write_text(_TABLE.sub(lambda _: keys_table(), README.read_text()))

"""Prepare the quickstart's data: docstring writing, from Python's own standard library.

Each sample shows a function of the running interpreter's standard library with its docstring
taken out, and asks for the first paragraph of that docstring. Train and held-out samples come
from different top-level modules. Nothing is downloaded; the same interpreter and options always
give the same bytes. Later runs only verify the checksums recorded in ``prepared.json``.

The texts belong to Python and its licence (PSF-2.0). Any base model has most likely seen them
in pre-training, before either split: compare models on these samples, don't rank them by it.

Usage: python quickstart/prepare_data.py [--output quickstart/cache/data]
                                         [--held-out-fraction 0.15]
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import inspect
import json
import os
import platform
import re
import sys
import sysconfig
import textwrap
import tokenize
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

# Raise whenever this script would write different files: older caches are then rebuilt.
FORMAT = 1

MARKER = "prepared.json"
TRAIN = "train.jsonl"
HELD_OUT = "held_out.jsonl"
DEFAULT_HELD_OUT_FRACTION = 0.15
LICENCE = "PSF-2.0 (source and docstrings of the Python standard library)"

# Tests aren't written to be read, the rest is generated or not part of the library.
EXCLUDED_FOLDERS = {
    "__pycache__",
    "dist-packages",
    "idle_test",
    "lib-dynload",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
}
EXCLUDED_PREFIXES = ("config-", "_sysconfigdata")

# A sample of this size fits in 256 tokens of the quickstart's model, chat template included,
# all but a few: training on a CPU stays quick.
MAX_SOURCE_CHARACTERS = 700
MIN_DOCSTRING_CHARACTERS = 20
MAX_DOCSTRING_CHARACTERS = 240
MIN_DOCSTRING_WORDS = 4
# Keeps tkinter and idlelib, a fifth of all samples, from drowning the other modules.
MAX_SAMPLES_PER_MODULE = 50
MAX_TRAIN_SAMPLES = 2000
MAX_HELD_OUT_SAMPLES = 96  # evaluated before and after training, on a CPU

PROMPT = "Write the docstring of this Python function.\n\n```python\n{source}\n```"

FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef


class PreparationError(Exception):
    """What keeps the data from being prepared, in one line for the user."""


@dataclass(frozen=True)
class Pair:
    """A function without its docstring, and the first paragraph of that docstring."""

    module: str
    source: str
    docstring: str


def stable_hash(text: str) -> int:
    """Return a 64-bit number that depends on the text alone, unlike ``hash``."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def library_files(library: Path) -> Iterator[tuple[str, Path]]:
    """Yield each source file of the library with its top-level module, in a fixed order."""
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if EXCLUDED_FOLDERS.isdisjoint(parts) and not parts[0].startswith(EXCLUDED_PREFIXES):
            yield parts[0].removesuffix(".py"), path


def functions(node: ast.AST) -> Iterator[FunctionNode]:
    """Yield the functions and methods below a node, but not those nested in another."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, FunctionNode):
            yield child
        else:
            yield from functions(child)


def first_paragraph(docstring: str) -> str | None:
    """Return the docstring's first paragraph on one line, or None if it is no fair answer."""
    paragraph = re.split(r"\n\s*\n", inspect.cleandoc(docstring), maxsplit=1)[0]
    text = " ".join(paragraph.split())
    fair = (
        MIN_DOCSTRING_CHARACTERS <= len(text) <= MAX_DOCSTRING_CHARACTERS
        and len(text.split()) >= MIN_DOCSTRING_WORDS
        and text[0].isalpha()
        and not text.endswith(":")  # announces what the next paragraph says
        and ">>>" not in text
    )
    return text if fair else None


def source_without_docstring(node: FunctionNode, lines: list[str]) -> str | None:
    """Return the function's dedented source less its docstring, or None if it can't be shown."""
    statement = node.body[0]
    after = lines[statement.end_lineno - 1].encode()[statement.end_col_offset :]
    if len(node.body) == 1 or after.strip():
        return None  # nothing but the docstring, or code on the same line
    start = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    head = lines[start - 1 : statement.lineno - 1]
    body = lines[statement.end_lineno : node.end_lineno]
    while not body[0].strip():
        del body[0]
    source = textwrap.dedent("\n".join(head + body))
    if len(source) > MAX_SOURCE_CHARACTERS or "```" in source:
        return None
    try:
        (shown,) = ast.parse(source).body
    except (SyntaxError, ValueError):
        return None  # a string that spans lines kept it from being dedented whole
    # A second string right below the docstring would now stand in its place.
    return source if ast.get_docstring(shown) is None else None


def pairs_of_file(module: str, path: Path) -> Iterator[Pair]:
    """Yield the usable pairs of one source file, from top to bottom."""
    try:
        with tokenize.open(path) as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of old escapes and the like: not ours to mend
            text = file.read()
            tree = ast.parse(text)
    except (SyntaxError, ValueError):
        return  # kept broken on purpose, for some tool to meet
    lines = text.split("\n")  # as ast counts them; splitlines also splits at form feeds
    for node in functions(tree):
        docstring = first_paragraph(ast.get_docstring(node, clean=False) or "")
        source = docstring and source_without_docstring(node, lines)
        if source and docstring not in " ".join(source.split()):
            yield Pair(module, source, docstring)


def collect_pairs(library: Path) -> list[Pair]:
    """Return the library's pairs in reading order, with no source or docstring twice."""
    seen: set[str] = set()
    unique = []
    for module, path in library_files(library):
        for pair in pairs_of_file(module, path):
            # Over all modules, so that no held-out answer is also a train answer.
            keys = {pair.source, pair.docstring.casefold()}
            if seen.isdisjoint(keys):
                unique.append(pair)
            seen |= keys
    return unique


def split_pairs(pairs: Iterable[Pair], fraction: float) -> tuple[list[Pair], list[Pair]]:
    """Split by top-level module into train and held-out pairs, cap both and mix their modules."""
    by_module: dict[str, list[Pair]] = {}
    for pair in pairs:
        by_module.setdefault(pair.module, []).append(pair)
    train: list[Pair] = []
    held_out: list[Pair] = []
    for module, members in by_module.items():
        members.sort(key=lambda pair: stable_hash(pair.source))
        is_held_out = stable_hash(module) < fraction * 2**64
        (held_out if is_held_out else train).extend(members[:MAX_SAMPLES_PER_MODULE])
    # By another hash than above, or the big modules' samples would all come first.
    train.sort(key=lambda pair: stable_hash(pair.docstring))
    held_out.sort(key=lambda pair: stable_hash(pair.docstring))
    return train[:MAX_TRAIN_SAMPLES], held_out[:MAX_HELD_OUT_SAMPLES]


def to_json_lines(pairs: Iterable[Pair]) -> bytes:
    """Write pairs as the conversations that Axolotl reads with ``type: chat_template``."""
    lines = []
    for pair in pairs:
        messages = [
            {"role": "user", "content": PROMPT.format(source=pair.source)},
            {"role": "assistant", "content": pair.docstring},
        ]
        sample = {"messages": messages, "module": pair.module}
        lines.append(json.dumps(sample) + "\n")
    return "".join(lines).encode()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that its name never stands for half of it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def is_cached(output: Path, fraction: float) -> bool:
    """Tell whether the folder holds, whole, what a run with these settings would write."""
    try:
        marker = json.loads((output / MARKER).read_text(encoding="utf-8"))
        settings = marker["format"], marker["python"], marker["held_out_fraction"]
        return settings == (FORMAT, platform.python_version(), fraction) and all(
            hashlib.sha256((output / name).read_bytes()).hexdigest() == marker["sha256"][name]
            for name in (TRAIN, HELD_OUT)
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def prepare(output: Path, fraction: float, library: Path) -> str:
    """Make sure that both files are whole in the output folder, and return a line that says so."""
    if not 0 < fraction < 1:
        raise PreparationError(
            f"--held-out-fraction is {fraction}; it must lie between 0 and 1, such as 0.15"
        )
    if is_cached(output, fraction):
        return f"data ready (cached): {output}"
    train, held_out = split_pairs(collect_pairs(library), fraction)
    if not train or not held_out:
        raise PreparationError(
            f"found {len(train)} train and {len(held_out)} held-out samples, at least one of each "
            "is needed; use a Python with its library's .py files, or another --held-out-fraction"
        )
    contents = {TRAIN: to_json_lines(train), HELD_OUT: to_json_lines(held_out)}
    marker = {
        "format": FORMAT,
        "python": platform.python_version(),
        "held_out_fraction": fraction,
        "counts": {TRAIN: len(train), HELD_OUT: len(held_out)},
        "sha256": {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()},
        "held_out_modules": sorted({pair.module for pair in held_out}),
        "licence": LICENCE,
    }
    output.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        write_whole(output / name, content)
    # Last: until it is there, an older marker's checksums don't match the new files.
    write_whole(output / MARKER, (json.dumps(marker, indent=2) + "\n").encode())
    return f"data ready: {len(train)} train and {len(held_out)} held-out samples in {output}"


def main(arguments: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(description="Prepare the quickstart's data.")
    default = Path(__file__).resolve().parent / "cache" / "data"
    parser.add_argument(
        "--output", type=Path, default=default, help="default: quickstart/cache/data"
    )
    parser.add_argument(
        "--held-out-fraction",
        type=float,
        default=DEFAULT_HELD_OUT_FRACTION,
        help="part of the modules to hold out (default: %(default)s)",
    )
    options = parser.parse_args(arguments)
    library = Path(sysconfig.get_path("stdlib"))
    try:
        print(prepare(options.output, options.held_out_fraction, library))
    except PreparationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {error}; --output must name a writable folder", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Safetensors files that are never seen half-written, with string metadata."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from ..errors import SpftError


def write_bytes(path: str | os.PathLike, content: bytes) -> None:
    """Write a file beside its place and rename it: readers see the old one or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        # mkstemp makes private files; give this one the mode that open() would have given it.
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def write_tensors(
    path: str | os.PathLike, tensors: dict[str, torch.Tensor], metadata: dict[str, str]
) -> None:
    """Write a safetensors file, replacing an older one in one step."""
    write_bytes(path, save({n: t.contiguous() for n, t in tensors.items()}, metadata=metadata))


def read_tensors(
    path: str | os.PathLike, kind: str
) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """Read a safetensors file whose metadata says that it is of the given kind.

    Raises:
        SpftError: there is no such file, it is damaged, or it is of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise SpftError(f"{path} does not exist; expected a file of kind {kind!r}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise SpftError(f"{path} is not a whole safetensors file ({error}); make it anew") from None
    if metadata.get("kind") != kind:
        raise SpftError(
            f"{path} is of kind {metadata.get('kind')!r}, but {kind!r} is needed here; "
            "check the path"
        )
    return tensors, metadata

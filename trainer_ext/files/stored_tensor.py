"""A tensor in a safetensors file, of which neurons are read and written where they lie.

By plain reads and writes, not through mapped memory: of a mapped file the system may bring in
megabytes around each row.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..errors import SpftError

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BLOCK_BYTES = 2**24  # read at a time where neurons are columns


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file.

    Attributes:
        path: the file.
        name: of the tensor in it.
        kind: its type by safetensors' name.
        shape: its shape.
        offset: of its first byte in the file.
    """

    path: Path
    name: str
    kind: str
    shape: tuple[int, ...]
    offset: int

    @classmethod
    def all_in(cls, path: Path) -> dict[str, StoredTensor]:
        """The tensors of a file, by name.

        Raises:
            SpftError: it is no whole safetensors file.
        """
        try:
            with path.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                size = os.fstat(file.fileno()).st_size
                header = json.loads(file.read(length)) if length <= size else {}
            header.pop("__metadata__", None)
            end = max(entry["data_offsets"][1] for entry in header.values())
            if size != 8 + length + end:
                raise ValueError(f"{size} bytes instead of {8 + length + end}")
            return {
                name: cls(
                    path,
                    name,
                    entry["dtype"],
                    tuple(entry["shape"]),
                    8 + length + entry["data_offsets"][0],
                )
                for name, entry in header.items()
            }
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SpftError(
                f"{path} is not a whole safetensors file ({error}); download or copy it anew"
            ) from None

    @property
    def dtype(self) -> torch.dtype:
        """
        Raises:
            SpftError: the tensor does not hold plain floating point numbers.
        """
        if self.kind not in _DTYPES:
            raise SpftError(
                f"{self.path} holds {self.name} as {self.kind}, so it is quantised itself and has "
                "no original rows; use the unquantised checkpoint"
            )
        return _DTYPES[self.kind]

    def read(self, index: torch.Tensor, columns: bool = False) -> torch.Tensor:
        """The weights of some neurons, (r, d_in).

        Args:
            index: int64 (r,).
            columns: the tensor is stored (d_in, d_out), so neurons are its columns.
        """
        if columns:
            blocks = [block[:, index] for _, block in self._blocks_of_file()]
            return torch.cat(blocks).t().contiguous()
        with self.path.open("rb") as file:
            size = self._row_bytes
            rows = [os.pread(file.fileno(), size, self.offset + i * size) for i in index.tolist()]
        return self._tensor(b"".join(rows))

    def write(self, index: torch.Tensor, rows: torch.Tensor, columns: bool = False) -> None:
        """Replace the weights of some neurons by (r, d_in) others, which are rounded."""
        rows = rows.to(self.dtype)
        with self._written() as put:
            if columns:
                for start, block in self._blocks_of_file():
                    block[:, index] = rows[:, start : start + len(block)].t()
                    put(start, block)
                return
            for i, row in zip(index.tolist(), rows, strict=True):
                put(i, row)

    def replace(self, tensor: torch.Tensor) -> None:
        """Write another tensor of the same shape in its place, rounded."""
        with self._written() as put:
            put(0, tensor.to(self.dtype))

    @contextmanager
    def _written(self):
        """A function that writes stored rows from the given one on."""
        with self.path.open("r+b") as file:

            def put(row: int, values: torch.Tensor) -> None:
                file.seek(self.offset + row * self._row_bytes)
                # a file object writes all; one system call writes 2 GiB at most
                file.write(_bytes(values))

            yield put
            file.flush()
            os.fsync(file.fileno())

    @property
    def _row_bytes(self) -> int:
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def _blocks_of_file(self) -> Iterator[tuple[int, torch.Tensor]]:
        """First row and content of blocks of stored rows."""
        most = max(1, _BLOCK_BYTES // self._row_bytes)
        with self.path.open("rb") as file:
            for start in range(0, self.shape[0], most):
                size = min(most, self.shape[0] - start) * self._row_bytes
                at = self.offset + start * self._row_bytes
                yield start, self._tensor(os.pread(file.fileno(), size, at))

    def _tensor(self, content: bytes) -> torch.Tensor:
        return torch.frombuffer(bytearray(content), dtype=self.dtype).view(-1, self.shape[1])


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.detach().cpu().contiguous().view(torch.uint8).numpy()).cast("B")

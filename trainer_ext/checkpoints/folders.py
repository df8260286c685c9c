"""Checkpoint folders that say themselves whether they are complete.

While a checkpoint is written its folder holds a mark that says so; when every process has finished,
the mark lists the files with their sizes. An interrupted run therefore goes on from the last
folder whose mark says that it is complete and whose files are all there.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch

from ..distributed.processes import (
    from_main_process,
    process_rank,
    sum_over_processes,
    wait_for_all,
    world_size,
)
from ..errors import SpftError
from ..files.atomic import write_bytes

logger = logging.getLogger(__name__)

MARK_FILE = "spft_checkpoint.json"
_FOLDER = re.compile(r"checkpoint-(\d+)$")


@dataclass(frozen=True)
class CheckpointMark:
    """What a checkpoint's folder says of itself.

    Attributes:
        complete: whether every process had written all that it writes.
        step: optimizer steps done.
        engine: what the run trained under, as users call it.
        world_size: number of processes.
        global_batch: rows of one optimizer step over all processes.
        files: path in the folder -> bytes, of a complete checkpoint.
    """

    complete: bool
    step: int
    engine: str
    world_size: int
    global_batch: int
    files: dict[str, int] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: str | os.PathLike) -> CheckpointMark | None:
        """The mark of a folder; None if it has none, or one that cannot be read."""
        try:
            return cls(**json.loads((Path(folder) / MARK_FILE).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            return None

    def write(self, folder: str | os.PathLike) -> None:
        write_bytes(Path(folder) / MARK_FILE, json.dumps(asdict(self), indent=1).encode())


def begin_checkpoint(folder: str | os.PathLike, mark: CheckpointMark) -> None:
    """Empty a checkpoint's folder and mark it as incomplete; all processes must come here."""
    if process_rank() == 0:
        mark.write(folder)  # first: what is half removed must not look complete
        for path in Path(folder).iterdir():  # of an interrupted run, maybe under another engine
            if path.name != MARK_FILE:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    wait_for_all()


def finish_checkpoint(folder: str | os.PathLike, mark: CheckpointMark) -> None:
    """Mark a checkpoint as complete; all processes must come here when they have written theirs."""
    wait_for_all()
    if process_rank():
        return
    folder, files = Path(folder), {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != MARK_FILE:
            with path.open("rb") as file:
                os.fsync(file.fileno())
            files[path.relative_to(folder).as_posix()] = path.stat().st_size
    replace(mark, complete=True, files=files).write(folder)


def what_is_missing(folder: str | os.PathLike) -> str | None:
    """Why a checkpoint cannot be trusted, in a few words; None if it is complete."""
    mark = CheckpointMark.read(folder)
    if mark is None:
        return f"it has no readable {MARK_FILE}"
    if not mark.complete:
        return "its run ended while it was being written"
    for name, size in mark.files.items():
        path = Path(folder) / name
        if not path.is_file():
            return f"its file {name} is missing"
        if path.stat().st_size != size:
            return f"its file {name} has {path.stat().st_size} bytes instead of {size}"
    return None


def last_complete(output_dir: str | os.PathLike) -> str | None:
    """The complete checkpoint of the highest step, the same on all processes, which must all ask.

    Raises:
        SpftError: a process does not see it.
    """
    return _seen_by_all(from_main_process(_last_complete_here(output_dir)))


def _last_complete_here(output_dir: str | os.PathLike) -> str | None:
    output_dir = Path(output_dir)
    numbered = {
        int(match[1]): path
        for path in (output_dir.iterdir() if output_dir.is_dir() else ())
        if path.is_dir() and (match := _FOLDER.match(path.name))
    }
    for step in sorted(numbered, reverse=True):
        missing = what_is_missing(numbered[step])
        if missing is None:
            return str(numbered[step])
        if process_rank() == 0:
            logger.warning("%s is passed over: %s", numbered[step], missing)
    return None


def check_given_checkpoint(folder: str | os.PathLike) -> str:
    """A checkpoint that the user has named; all processes must ask.

    One without a mark, of another program, is taken at the user's word.

    Raises:
        SpftError: it does not exist, its mark says that it is incomplete, or a process does not
            see it.
    """
    folder = str(folder)
    problem = None
    if process_rank() == 0:
        if not Path(folder).is_dir():
            problem = "there is no such folder"
        elif CheckpointMark.read(folder) is None:
            logger.warning("%s has no %s; it is taken to be complete", folder, MARK_FILE)
        else:
            problem = what_is_missing(folder)
        if problem is not None:
            other = _last_complete_here(Path(folder).parent)
            mend = f"use {other}" if other else "start anew, there is no complete one beside it"
            problem = f"the checkpoint {folder!r} cannot be resumed from: {problem}; {mend}"
    problem = from_main_process(problem)
    if problem is not None:
        raise SpftError(problem)
    return _seen_by_all(folder)


def _seen_by_all(folder: str | None) -> str | None:
    if folder is None:
        return None
    blind = torch.zeros(world_size())
    blind[process_rank()] = float(not Path(folder).is_dir())
    ranks = sum_over_processes({"blind": blind})["blind"].nonzero().flatten().tolist()
    if ranks:
        raise SpftError(
            f"rank {ranks[0]} does not see the checkpoint {folder!r}, which rank 0 does; "
            "output_dir must be on a file system that all nodes share"
        )
    return folder

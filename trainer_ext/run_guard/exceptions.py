"""What a process tells the others of an exception that ends it, and what it says of theirs.

At most one training of a process is watched at a time.
"""

from __future__ import annotations

import atexit
import os
import re
import sys

import torch.distributed as dist

from ..errors import SpftError
from .verdict import GO_ON, LEFT
from .watchdog import Watchdog

_COMMUNICATION = re.compile(
    r"gloo|nccl|c10d|process ?group|connection (closed|reset|refused)|broken pipe", re.IGNORECASE
)
_watched: Watchdog | None = None
_others_hook = None


def begin_watch(watchdog: Watchdog) -> None:
    """Start the watchdog, and tell the others through it if an exception ends this process."""
    global _watched, _others_hook
    end_watch(LEFT)  # an earlier training ended by an exception that somebody caught
    _watched, _others_hook = watchdog, sys.excepthook
    sys.excepthook = _hook(watchdog, _others_hook)
    # sys.exit in the middle is told too; and a thread in a store call must not see Python end.
    atexit.register(end_watch, LEFT)
    watchdog.start()


def end_watch(status: str) -> None:
    """Stop what `begin_watch` started, if anything."""
    global _watched
    if _watched is None:
        return
    _watched.stop(status)
    _watched = None
    atexit.unregister(end_watch)
    if getattr(sys.excepthook, "__wrapped__", None) is _others_hook:
        sys.excepthook = _others_hook


def _hook(watchdog: Watchdog, others):
    pid = os.getpid()

    def hook(kind, error, traceback):
        others(kind, error, traceback)
        if watchdog is _watched and os.getpid() == pid:  # a data loader's worker is another process
            line = explain(watchdog, error)
            if line:
                watchdog.say(line)

    hook.__dict__.update(getattr(others, "__dict__", {}))  # marks by which hooks are known
    hook.__wrapped__ = others
    return hook


def explain(watchdog: Watchdog, error: BaseException) -> str:
    """Tell the others of an exception; what to say of it here, if anything.

    Takes some beats if the exception says that another process is gone.
    """
    lost = is_communication_error(error)
    message = " ".join(str(error).split())[:200]
    reason = f"{type(error).__name__}: {message}" if message else type(error).__name__
    verdict = watchdog.failed(reason, lost)
    if isinstance(error, (SpftError, KeyboardInterrupt)):
        return ""  # says all there is to say
    if verdict is not None and watchdog.rank not in verdict.ranks:
        return verdict.line
    if lost:
        everyone = watchdog.board.describe()
        return f"the processes lost each other, and nobody is known to be gone: {everyone}; {GO_ON}"
    own = watchdog.board.sightings[watchdog.rank].record
    return f"rank {own.rank} ({own.host}) raised {reason}, {own.where}; {GO_ON}"


def is_communication_error(error: BaseException) -> bool:
    """Whether it was raised because another process could not be reached."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and bool(_COMMUNICATION.search(str(error)))

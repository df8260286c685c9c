"""An exception that ends a process goes to the hooks that were there before, with their marks, and
then to the other processes. Of an ordinary one a line says rank and reason, of a broken connection
who is gone; of a user's mistake nothing more is said. The hook goes when the run ends, and a later
run takes the place of one that an exception ended."""

from __future__ import annotations

import sys

import pytest
import torch.distributed as dist

from trainer_ext import SpftError
from trainer_ext.run_guard.exceptions import begin_watch, end_watch
from trainer_ext.run_guard.verdict import LEFT, Verdict
from trainer_ext.run_guard.watchdog import Watchdog


@pytest.fixture
def calls(monkeypatch) -> list:
    calls = []

    def others(kind, error, traceback):
        calls.append(error)

    others.shows_spft_errors = True
    monkeypatch.setattr(sys, "excepthook", others)
    yield calls
    end_watch("done")
    assert sys.excepthook is others


def watched(monkeypatch, calls, verdict=None) -> tuple[Watchdog, list[str]]:
    lines = []
    watchdog = Watchdog(
        dist.HashStore(), 0, 2, hang_after=1e3, interval=1e3, say=lines.append, end=pytest.fail
    )

    def failed(reason, lost):
        calls.append((reason, lost))
        return verdict

    monkeypatch.setattr(watchdog, "failed", failed)
    begin_watch(watchdog)
    return watchdog, lines


def raised(error: BaseException) -> None:
    sys.excepthook(type(error), error, None)


def test_an_error_is_told_after_the_other_hooks(monkeypatch, calls):
    _, lines = watched(monkeypatch, calls)
    error = ValueError("bad\nnews")
    raised(error)
    assert calls == [error, ("ValueError: bad news", False)]
    assert len(lines) == 1
    assert lines[0].startswith("rank 0 (")
    assert "raised ValueError: bad news" in lines[0]


def test_marks_of_other_hooks_are_kept(monkeypatch, calls):
    watched(monkeypatch, calls)
    assert sys.excepthook.shows_spft_errors


@pytest.mark.parametrize("error", [SpftError("a mistake"), KeyboardInterrupt()])
def test_what_says_all_by_itself_is_told_to_the_others_alone(monkeypatch, calls, error):
    _, lines = watched(monkeypatch, calls)
    raised(error)
    assert calls[1][0].startswith(type(error).__name__)
    assert not lines


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[gloo/transport/tcp/pair.cc:537] Read error: Connection reset by peer"),
        dist.DistBackendError("NCCL communicator was aborted"),
        dist.DistNetworkError("Broken pipe"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_a_broken_connection_asks_who_is_gone(monkeypatch, calls, error):
    _, lines = watched(monkeypatch, calls, Verdict("rank 1 has died", [1]))
    raised(error)
    assert calls[1][1] is True
    assert lines == ["rank 1 has died"]


def test_where_nobody_is_gone_everyones_place_is_told(monkeypatch, calls):
    _, lines = watched(monkeypatch, calls)
    raised(dist.DistBackendError("NCCL error"))
    assert lines[0].startswith("the processes lost each other, and nobody is known to be gone: ")


def test_memory_that_runs_out_is_an_error_of_ones_own(monkeypatch, calls):
    watched(monkeypatch, calls)
    raised(RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"))
    assert calls[1][1] is False


def test_a_later_run_takes_the_place_of_one_that_was_left(monkeypatch, calls):
    first, said_by_first = watched(monkeypatch, calls)
    second, said_by_second = watched(monkeypatch, calls)
    assert first._status == LEFT
    assert not first._thread.is_alive()
    raised(ValueError("bad"))
    assert (len(said_by_first), len(said_by_second)) == (0, 1)
    assert second._thread.is_alive()

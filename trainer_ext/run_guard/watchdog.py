"""A thread of each process that posts its progress and ends the run when another process stops.

Training threads only write a tuple (`Watchdog.note`); all traffic is the thread's own, over a
connection of its own to the store by which torch.distributed's processes met. So a training thread
that is blocked in a collective does not keep anybody from finding out why.
"""

from __future__ import annotations

import logging
import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from types import CodeType

import torch.distributed as dist

from ..distributed.engine import Engine
from ..distributed.engines import ENGINES
from .verdict import DONE, FAILED, GO_ON, LEFT, LOST, RUNNING, Board, Record, Verdict, judge

logger = logging.getLogger(__name__)

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: the same command may succeed later
_VERDICT = "verdict"
_LEAVING = 10.0  # seconds that a process which has raised may take to its exit
# Where a training thread stands while it waits for others.
_WAITING = tuple(place for kind in (Engine, *ENGINES) for place in kind.waits_in)


class Watchdog:
    """Watches over the processes of one run, from `start` to `stop`.

    Args:
        store: a connection that nobody else uses, with a prefix that all processes of this run
            share and no other run does.
        rank, world: of this process, and their number.
        hang_after: seconds without progress on any process that count as a hang.
        dead_after: seconds without a post after which a process counts as gone.
        interval: seconds between posts. It grows with the number of processes by default, for every
            process reads all posts.
        address: of the store, for the message that it cannot be reached.
        loop: code of the training loop's function; a training thread that is no longer in it, by an
            exception that somebody caught, has left the training.
        clock, say, end: for tests; take the time, print a line, end the process.
    """

    def __init__(
        self,
        store: dist.Store,
        rank: int,
        world: int,
        *,
        hang_after: float,
        dead_after: float = 60.0,
        interval: float | None = None,
        address: str = "",
        loop: CodeType | None = None,
        clock: Callable[[], float] = time.monotonic,
        say: Callable[[str], None] | None = None,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        self.rank, self.world = rank, world
        self.interval = 2.0 + world / 64 if interval is None else interval
        self.hang_after, self.dead_after = hang_after, max(dead_after, 5 * self.interval)
        self.verdict: Verdict | None = None
        self.told = threading.Event()  # the others know what this process raised
        self.judged = threading.Event()
        self.board = Board.empty(world, clock())
        self._store, self._address, self._loop = store, address, loop
        self._clock, self.say, self._end = clock, say or _print, end
        self._host = socket.gethostname()
        self._progress = (-1, 0, "not begun", False)
        self._status, self._reason = RUNNING, ""
        self._beat = 0
        self._looked = clock()
        self._unreachable_since: float | None = None
        self._warned = False
        self._failing = threading.Event()
        self._stopping, self._wake = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._trains = threading.get_ident()

    def note(self, step: int, phase: str, patient: bool = False) -> None:
        """Say that training has come further. Costs a tuple.

        Args:
            step: the optimizer step that is worked on, from 1.
            phase: what comes now, in words.
            patient: files are read or written now, which may keep the thread from running.
        """
        last, notes = self._progress[:2]
        self._progress = (step, notes + 1 if step == last else 0, phase, patient)

    def start(self) -> None:
        """Begin to watch, called by the thread that trains."""
        self._trains = threading.get_ident()
        if self._loop is not None and not self._in_loop():
            self._loop = None  # the loop is another's: leaving it cannot be seen
        self._thread = threading.Thread(target=self._run, name="spft-watchdog", daemon=True)
        self._thread.start()

    def stop(self, status: str = DONE) -> None:
        """Say that this process needs no watching any more, and end the thread."""
        if self._status == RUNNING:
            self._status = status
        self._stopping.set()
        self._wake.set()
        if self._thread is not None:
            self._thread.join(timeout=5.0)

    def failed(self, reason: str, lost: bool) -> Verdict | None:
        """Tell the others what this process raised, and hear whose fault it is.

        Called by the training thread, on its way out. Returns soon unless `lost`: then it takes
        some beats to see who is missing.

        Args:
            lost: it was raised because another process could not be reached.

        Returns:
            Who is to blame, if `lost` and known.
        """
        self._status, self._reason = LOST if lost else FAILED, reason
        self._failing.set()
        self._wake.set()
        (self.judged if lost else self.told).wait(timeout=8 * self.interval + 1.0)
        self._linger()
        return self.verdict

    def poll(self) -> None:
        """Post, read and judge once; what the thread does every `interval` seconds."""
        now = self._clock()
        own = self._own_record()
        self.board.see(own, now)
        try:
            self._exchange(own)
        except (RuntimeError, ValueError) as error:  # DistError is a RuntimeError
            verdict = self._judge_unreachable(now, error)
        else:
            self._unreachable_since = None
            verdict = self._judge(now)
        if verdict is not None and verdict.ends:
            self._conclude(verdict)
        elif verdict is not None and not self._warned:
            self._warned = True
            self.say(verdict.line)
            self._show_stack()

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.poll()
            except Exception:  # a mistake here must not cost a run
                logger.warning("the watchdog failed once", exc_info=True)
            self._wake.wait(self.interval)
            self._wake.clear()
        if self._status in (DONE, LEFT):
            try:
                self._store.set(str(self.rank), self._own_record().to_json())
            except (RuntimeError, ValueError):
                logger.debug("the watchdog's last post did not arrive", exc_info=True)

    def _own_record(self) -> Record:
        self._beat += 1
        if self._status == RUNNING and self._loop is not None and not self._in_loop():
            self._status = LEFT
        step, notes, phase, patient = self._progress
        place, waits = self._place()
        state = (phase, patient, place, waits, self._status, self._reason)
        return Record(self.rank, self._host, self._beat, step, notes, *state)

    def _exchange(self, own: Record) -> None:
        """Post this process's record, and read those of all others that have begun."""
        store = self._store
        store.set(str(self.rank), own.to_json())
        if own.status in (FAILED, LOST):
            self.told.set()
        known = [
            rank
            for rank, sighting in self.board.sightings.items()
            if rank != self.rank and (sighting.seen or store.check([str(rank)]))
        ]
        texts = store.multi_get([str(rank) for rank in known]) if known else []
        if self.verdict is None and store.check([_VERDICT]):
            self.verdict = Verdict.from_json(store.get(_VERDICT))
        now = self._clock()
        gap = now - self._looked
        if gap > 3 * self.interval:  # this process was suspended, or the store was away
            self.board.shift(gap - self.interval)
        self._looked = now
        for text in texts:
            self.board.see(Record.from_json(text), now)

    def _judge(self, now: float) -> Verdict | None:
        if self.verdict is not None:
            return self.verdict
        lost = self._status == LOST
        # An exception that tells of a missing process and its silence are two witnesses.
        dead_after = 4 * self.interval if lost else self.dead_after
        verdict = judge(self.board, self.rank, now, self.hang_after, dead_after, lost)
        if verdict is not None and verdict.ends:
            try:  # everyone says the same, and a process that hangs hears of it
                self._store.set(_VERDICT, verdict.to_json())
            except (RuntimeError, ValueError):
                logger.debug("the verdict did not reach the others", exc_info=True)
        return verdict

    def _judge_unreachable(self, now: float, error: Exception) -> Verdict | None:
        """The store is away. That alone does not end a run whose steps go on."""
        since = self._unreachable_since
        if since is None:
            self._unreachable_since = since = now
        lost = self._status == LOST
        still = now - self.board.sightings[self.rank].moved_at
        allowed = 2 * self.interval if lost else self.dead_after
        if now - since < allowed or (not lost and still < allowed):
            if not lost:  # connecting takes longer than such a process waits
                self._reconnect()
            return None
        at = f" at {self._address}" if self._address else ""
        host = "the launcher of rank 0's machine" if _launcher_hosts_store() else "rank 0"
        since = f" for {now - since:.0f} s" if now - since >= 1.0 else ""
        reason = " ".join(str(error).split())[:120]
        return Verdict(
            f"{host}, which hosts the rendezvous{at}, has died or cannot be reached{since} "
            f"({reason}); {GO_ON}"
        )

    def _reconnect(self) -> None:
        try:
            self._store = self._store.clone()
        except (RuntimeError, ValueError):
            logger.debug("the store cannot be reached", exc_info=True)

    def _conclude(self, verdict: Verdict) -> None:
        """End this process, unless its training thread is on its way out by itself."""
        self.verdict = verdict
        self.judged.set()
        if self._status != RUNNING:
            return
        # A thread that has lost its peer raises too, and says more; one that hangs never will.
        patience = 0.0 if verdict.stuck else 2 * self.interval
        if self._failing.wait(patience) or self._stopping.is_set():
            return
        self.say(verdict.line)
        if verdict.stuck and self.rank in verdict.ranks:
            self._show_stack()
        self._linger()
        if self._failing.is_set() and self._stopping.wait(_LEAVING):
            return  # the training thread has raised meanwhile, and is at its exit
        sys.stdout.flush()
        self._end(EXIT_CODE)

    def _linger(self) -> None:
        """Let the others read what happened before the process that may host the store is gone."""
        if self.rank == 0 and not _launcher_hosts_store():
            time.sleep(3 * self.interval)

    def _show_stack(self) -> None:
        """Where this process's training thread is, on stderr."""
        frame = sys._current_frames().get(self._trains)
        if frame is not None:
            lines = traceback.format_stack(frame)
            self.say(f"rank {self.rank} stands here:\n{''.join(lines).rstrip()}")

    def _place(self) -> tuple[str, bool]:
        """Function and line that the training thread is in, and whether it waits for others."""
        frame = sys._current_frames().get(self._trains)
        if frame is None:
            return "", False
        code = frame.f_code
        file = code.co_filename.replace("\\", "/")
        place = f"{code.co_name} ({Path(file).name}:{frame.f_lineno})"
        return place, any(part in file for part in _WAITING)

    def _in_loop(self) -> bool:
        frame = sys._current_frames().get(self._trains)
        while frame is not None:
            if frame.f_code is self._loop:
                return True
            frame = frame.f_back
        return False


def _launcher_hosts_store() -> bool:
    """Whether torchrun's agent hosts the rendezvous store, not the process of rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _print(line: str) -> None:
    print(f"axolotl-spft: {line}", file=sys.stderr, flush=True)

"""What the processes of a run tell each other of themselves, and who is to blame when it stops.

Nothing here knows a clock, a store or a thread: `watchdog` brings them.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field

from .agreement import name_ranks

RUNNING = "running"
DONE = "done"  # has trained to the end
FAILED = "failed"  # raised an error of its own
LOST = "lost"  # raised an error because it cannot reach another process
LEFT = "left"  # is no longer in the training loop, and goes on with something else
GO_ON = (
    "start again with resume_from_checkpoint (YAML: auto_resume_from_checkpoints): the run goes on "
    "from its last complete checkpoint"
)


@dataclass(frozen=True)
class Record:
    """What a process posts of itself.

    Attributes:
        beat: how often it has posted; stands still when the process is gone.
        step: the optimizer step that it works on, from 1; -1 before it has begun.
        notes: signs of progress within this step. (step, notes) orders the processes.
        phase: what it does, in words.
        patient: it reads or writes files now, which may keep its thread from posting.
        place: function and line that its training thread is in.
        waits: that is in a collective or a backward, so it may be waiting for others.
        status, reason: one of the constants above; what it raised.
    """

    rank: int
    host: str = ""
    beat: int = 0
    step: int = -1
    notes: int = 0
    phase: str = "not begun"
    patient: bool = False
    place: str = ""
    waits: bool = False
    status: str = RUNNING
    reason: str = ""

    @property
    def progress(self) -> tuple[int, int]:
        return self.step, self.notes

    @property
    def where(self) -> str:
        if self.step < 0:
            return "before training"
        return f"at step {self.step} ({self.phase})"

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Record:
        return cls(**json.loads(text))


@dataclass
class Sighting:
    """The latest record of a process, and when its parts last changed by the reader's clock."""

    record: Record
    beat_at: float
    moved_at: float
    status_at: float
    seen: bool = False  # False: it has not posted yet

    def update(self, record: Record, now: float) -> None:
        if not self.seen or record.beat != self.record.beat:
            self.beat_at = now
        if not self.seen or record.progress != self.record.progress:
            self.moved_at = now
        if record.status != self.record.status:
            self.status_at = now
        self.record, self.seen = record, True


@dataclass
class Board:
    """What one process has seen of all, itself included."""

    sightings: dict[int, Sighting]

    @classmethod
    def empty(cls, world: int, now: float) -> Board:
        return cls({rank: Sighting(Record(rank), now, now, now) for rank in range(world)})

    def see(self, record: Record, now: float) -> None:
        self.sightings[record.rank].update(record, now)

    def shift(self, seconds: float) -> None:
        """Leave out a time in which nobody looked: a process was suspended, or the store away."""
        for sighting in self.sightings.values():
            sighting.beat_at += seconds
            sighting.moved_at += seconds
            sighting.status_at += seconds

    def describe(self) -> str:
        """Where everyone is, ranks at the same point together."""
        at: dict[str, dict[int, str]] = {}
        for rank, sighting in self.sightings.items():
            record = sighting.record
            words = record.where + (f", in {record.place}" if record.place else "")
            at.setdefault(words, {})[rank] = record.host
        return "; ".join(f"{name_ranks(ranks)} {words}" for words, ranks in at.items())


@dataclass(frozen=True)
class Verdict:
    """Why the run cannot go on.

    Attributes:
        line: what users read.
        ranks: who is to blame.
        stuck: they hang, so their stacks tell something.
        ends: the run is to end; else it is a warning.
    """

    line: str
    ranks: list[int] = field(default_factory=list)
    stuck: bool = False
    ends: bool = True

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Verdict:
        return cls(**json.loads(text))


def judge(
    board: Board, me: int, now: float, hang_after: float, dead_after: float, lost: bool = False
) -> Verdict | None:
    """Who keeps the run from going on, or None.

    What is certain comes first: a process that says what it raised, then one that is silent, then
    one that hangs. A process that is at fault sees nothing of itself here but that it hangs.

    Args:
        hang_after: seconds without any progress on any process.
        dead_after: seconds without a post; `hang_after` while a process reads or writes files,
            unless `lost`.
        lost: an exception has told this process already that somebody is missing.
    """
    others = {rank: s for rank, s in board.sightings.items() if rank != me and s.seen}
    for rank, sighting in others.items():
        if sighting.record.status == FAILED:
            return Verdict(
                f"{_who(sighting)} raised {sighting.record.reason}, "
                f"{sighting.record.where}; {GO_ON}",
                [rank],
            )
    silent = [s for s in others.values() if _is_silent(s, now, hang_after, dead_after, lost)]
    if silent:
        sighting = min(silent, key=lambda s: s.beat_at)
        return Verdict(
            f"{_who(*silent)} {'has' if len(silent) == 1 else 'have'} died or cannot be reached: "
            f"nothing heard for {now - sighting.beat_at:.0f} s, last "
            f"{sighting.record.where}; {GO_ON}",
            [s.record.rank for s in silent],
        )
    for rank, sighting in others.items():
        record = sighting.record
        if record.status in (LOST, LEFT) and now - sighting.status_at >= dead_after:
            reason = f" after {record.reason}" if record.reason else ""
            return Verdict(
                f"{_who(sighting)} has left the training{reason}, {record.where}; {GO_ON}", [rank]
            )
    return _hanging(board, now, hang_after)


def _is_silent(s: Sighting, now: float, hang_after: float, dead_after: float, lost: bool) -> bool:
    allowed = max(hang_after, dead_after) if s.record.patient and not lost else dead_after
    return s.record.status == RUNNING and now - s.beat_at >= allowed


def _hanging(board: Board, now: float, hang_after: float) -> Verdict | None:
    """Who has the least progress when nobody has moved for `hang_after`.

    Processes that wait in a collective do not move either, so one that stands still is at fault
    only if all do. Where all have come equally far, those at fault are the ones that do not wait.
    If none of them waits for others they may all be busy (a long evaluation without callbacks):
    then this is said once, and the run ends after twice the time.
    """
    running = [s for s in board.sightings.values() if s.record.status == RUNNING]
    still = min((now - s.moved_at for s in running), default=0.0)
    if still < hang_after:
        return None
    least = min(s.record.progress for s in running)
    behind = [s for s in running if s.record.progress == least]
    busy = [s for s in behind if not s.record.waits]
    culprits = busy if 0 < len(busy) < len(behind) else behind
    finished = any(s.record.status == DONE for s in board.sightings.values())
    if len(culprits) < len(running) or finished:
        ahead = [s for s in running if s not in culprits]
        others = f"{_who(*ahead)} waits" if len(ahead) == 1 else "the others wait"
        meanwhile = f"{others} {ahead[0].record.where}" if ahead else "the others are done"
        record = culprits[0].record
        place = f", in {record.place}" if record.place else ""
        line = (
            f"{_who(*culprits)} {'hangs' if len(culprits) == 1 else 'hang'}: {record.where} for "
            f"{still:.0f} s{place}, while {meanwhile}; if that may take so long, raise "
            f"ddp_timeout; {GO_ON}"
        )
        return Verdict(line, [s.record.rank for s in culprits], stuck=True)
    line = f"all ranks are stuck at the same point for {still:.0f} s: {board.describe()}"
    ends = still >= 2 * hang_after or not busy
    advice = GO_ON if ends else "the run ends if nothing moves for as long again"
    return Verdict(
        f"{line}; if that may take so long, raise ddp_timeout; {advice}",
        [s.record.rank for s in running],
        stuck=True,
        ends=ends,
    )


def _who(*sightings: Sighting) -> str:
    return name_ranks({s.record.rank: s.record.host for s in sightings})

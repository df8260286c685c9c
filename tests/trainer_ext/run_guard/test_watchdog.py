"""Watchdogs on one store, by a clock that the test moves. While processes make progress, wait for
each other no longer than allowed, save, or are done, nothing is said. One that is silent, raises,
leaves or hangs ends every process with one line that names it, and only the hanging one shows its
stack; processes that may all be busy are warned first. Nobody is blamed for a time in which nobody
looked, nor for a store that is away while steps go on."""

from __future__ import annotations

import threading

import pytest
import torch.distributed as dist

from trainer_ext.run_guard.verdict import LEFT, Record
from trainer_ext.run_guard.watchdog import EXIT_CODE, Watchdog

HANG, DEAD, BEAT = 100.0, 30.0, 1.0


class Process:
    """A watchdog whose process's fate the test decides."""

    def __init__(self, run: Run, rank: int, world: int) -> None:
        self.lines: list[str] = []
        self.code: int | None = None
        self.alive = True
        self.place = ("busy (code.py:1)", False)
        self.watchdog = Watchdog(
            dist.PrefixStore("run", run.store),
            rank,
            world,
            hang_after=HANG,
            dead_after=DEAD,
            interval=BEAT,
            clock=lambda: run.now,
            say=self.lines.append,
            end=self._end,
        )
        self.watchdog._place = lambda: self.place
        self.watchdog._linger = lambda: None
        self.watchdog._failing.wait = lambda patience: self.watchdog._failing.is_set()

    def _end(self, code: int) -> None:
        self.code, self.alive = code, False

    def trains(self, step: int, phase: str = "training", **more) -> None:
        self.watchdog.note(step, phase, **more)

    @property
    def said(self) -> str:
        return "\n".join(self.lines)


class Run:
    def __init__(self, world: int = 3) -> None:
        self.store, self.now = dist.HashStore(), 0.0
        self.processes = [Process(self, rank, world) for rank in range(world)]

    def __iter__(self):
        return iter(self.processes)

    def __getitem__(self, rank: int) -> Process:
        return self.processes[rank]

    def all_train(self, step: int) -> None:
        for process in self:
            process.trains(step)

    def passes(self, seconds: float, each_beat=lambda: None) -> None:
        """Time goes by; who is alive beats."""
        for _ in range(int(seconds / BEAT)):
            self.now += BEAT
            each_beat()
            for process in self:
                if process.alive:
                    process.watchdog.poll()

    def assert_ended(self, *ranks: int, by: str) -> None:
        for rank in ranks:
            assert self[rank].code == EXIT_CODE, rank
            assert by in self[rank].lines[0], self[rank].lines

    def assert_silence(self) -> None:
        assert [p.code for p in self] == [None] * len(self.processes)
        assert not any(p.lines for p in self)


@pytest.fixture
def run() -> Run:
    run = Run()
    run.all_train(1)
    run.passes(2)
    return run


def test_progress_is_left_alone(run):
    for step in range(2, 40):
        run.all_train(step)
        run.passes(HANG / 4)
    run.assert_silence()


def test_waiting_for_a_slow_process_is_left_alone(run):
    run[0].trains(2)
    run[2].trains(2)
    run.passes(HANG - 5)  # rank 1 saves, or compiles
    run[1].trains(2)
    run.passes(HANG - 5)
    run.assert_silence()


def test_progress_of_one_process_is_progress(run):
    steps = iter(range(2, 10**6))
    run.passes(3 * HANG, lambda: run[0].trains(next(steps)))
    run.assert_silence()


def test_a_silent_process_is_dead(run):
    run.all_train(17)
    run.passes(2)
    run[1].alive = False
    run.passes(DEAD - 3)
    run.assert_silence()
    run.passes(5)
    run.assert_ended(0, 2, by="rank 1 (")
    assert "died or cannot be reached: nothing heard for" in run[0].said
    assert "at step 17 (training)" in run[0].said
    assert "resume_from_checkpoint" in run[0].said
    assert run[1].code is None


def test_a_process_that_writes_files_may_be_silent_for_longer(run):
    run[1].trains(2, "saving a checkpoint", patient=True)
    run.passes(2)
    run[1].alive = False
    run.passes(2 * DEAD)
    run.assert_silence()
    run.passes(HANG)
    run.assert_ended(0, 2, by="rank 1 (")


def test_one_that_is_behind_hangs(run):
    run[0].trains(2)
    run[2].trains(3)
    run.passes(HANG + 5)
    run.assert_ended(0, 1, 2, by="rank 1 (")
    assert "hangs: at step 1 (training) for" in run[0].said
    assert "busy (code.py:1)" in run[0].said
    assert "ddp_timeout" in run[0].said
    # one line each, and the stack of the one that hangs, which says where
    assert [len(p.lines) for p in run] == [1, 2, 1]
    assert "test_watchdog.py" in run[1].lines[1]


def test_of_equal_progress_those_that_do_not_wait_hang(run):
    run[0].place = run[2].place = ("all_reduce (distributed_c10d.py:1)", True)
    run.passes(HANG + 5)
    run.assert_ended(0, 1, 2, by="rank 1 (")


def test_several_may_hang(run):
    run[0].trains(2)
    run.passes(HANG + 5)
    run.assert_ended(0, 1, 2, by="ranks 1 (")
    assert "hang: at step 1" in run[0].said


def test_all_at_one_point_are_warned_before_they_end(run):
    run.passes(HANG + 5)
    assert [p.code for p in run] == [None] * 3
    assert all(p.lines[0].startswith("all ranks are stuck at the same point") for p in run)
    assert [len(p.lines) for p in run] == [2, 2, 2]  # with the stack, and once
    run.passes(HANG)
    run.assert_ended(0, 1, 2, by="all ranks are stuck")


def test_all_waiting_for_each_other_end_at_once(run):
    for process in run:
        process.place = ("all_reduce (distributed_c10d.py:1)", True)
    run.passes(HANG + 5)
    run.assert_ended(0, 1, 2, by="all ranks are stuck")


def test_one_that_waits_for_those_that_are_done_hangs(run):
    for rank in (0, 2):
        run[rank].watchdog.stop()
        run[rank].watchdog._run()  # as its thread does at the end
        run[rank].alive = False
    run.passes(HANG + 5)
    assert run[1].code == EXIT_CODE
    assert "rank 1 (" in run[1].lines[0]
    assert "the others are done" in run[1].said


def test_those_that_are_done_are_not_missed(run):
    for process in run:
        process.watchdog.stop()
        process.watchdog._run()
        process.alive = False
    run[1].alive = True  # the last to notice
    run[1].watchdog._status = "running"
    run.passes(HANG - 5)
    run.assert_silence()


def test_an_error_ends_the_others_with_its_reason(run):
    run.all_train(3)
    run[1].watchdog.told.set()
    run[1].watchdog.failed("OutOfMemoryError: no more", lost=False)
    run.passes(2)
    run.assert_ended(0, 2, by="rank 1 (")
    assert "raised OutOfMemoryError: no more, at step 3 (training)" in run[0].said
    assert run[1].code is None  # its own exception ends it


def test_a_broken_connection_is_not_to_blame(run):
    """Two processes see that a third is gone before it is silent for long."""
    run[1].alive = False
    for rank in (0, 2):
        run[rank].watchdog.judged.set()
        run[rank].watchdog.failed("RuntimeError: Connection closed by peer", lost=True)
    run.passes(6)
    for rank in (0, 2):
        assert run[rank].code is None
        assert run[rank].watchdog.verdict.ranks == [1]
        assert "died or cannot be reached" in run[rank].watchdog.verdict.line


def test_one_that_left_the_training_ends_the_others(run):
    run[1].watchdog._status = LEFT
    run.passes(DEAD - 5)
    run.assert_silence()
    run.passes(10)
    run.assert_ended(0, 2, by="rank 1 (")
    assert "has left the training" in run[0].said
    assert run[1].code is None


def test_a_process_that_never_begins_hangs():
    run = Run()
    run[1].alive = False
    run[0].trains(0, "starting")
    run[2].trains(0, "starting")
    run.passes(HANG - 5)
    run.assert_silence()
    run.passes(10)
    run.assert_ended(0, 2, by="rank 1")
    assert "before training" in run[0].said


def test_nobody_is_blamed_for_a_time_in_which_nobody_looked(run):
    run.now += 10 * HANG  # the machine was asleep
    run.passes(DEAD - 5)
    run.assert_silence()


class Away:
    """A store that cannot be reached."""

    def set(self, key, value):
        raise dist.DistNetworkError("Broken pipe")

    def clone(self):
        return self


@pytest.mark.parametrize("torchrun", [False, True])
def test_a_store_that_is_away_ends_a_run_that_stands_still(run, torchrun, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", str(torchrun))
    host = "the launcher of rank 0's machine" if torchrun else "rank 0"
    run.processes.pop(0)
    for process in run:
        process.watchdog._store, process.watchdog._address = Away(), "host-a:29500"
    run.passes(DEAD - 5)
    run.assert_silence()
    run.passes(10)
    for process in run:
        assert process.code == EXIT_CODE
        assert process.said.startswith(f"{host}, which hosts the rendezvous at host-a:29500, has")


def test_a_store_that_is_away_does_not_end_a_run_that_moves(run):
    stores = [process.watchdog._store for process in run]
    for process in run:
        process.watchdog._store = Away()
    steps = iter(range(2, 10**6))
    run.passes(3 * HANG, lambda: run.all_train(next(steps)))
    for process, store in zip(run, stores, strict=True):
        process.watchdog._store = store
    run.passes(DEAD - 5)  # nobody was seen meanwhile
    run.assert_silence()


def test_records_pass_the_store_unchanged():
    record = Record(3, "host", 7, 5, 2, "training", True, "f (x.py:1)", True, "failed", "E: é\n")
    assert Record.from_json(record.to_json()) == record


def test_the_thread_ends_with_the_run_and_is_a_daemon():
    process = Run(1)[0]
    process.watchdog.interval = 1000
    process.watchdog.start()
    thread = process.watchdog._thread
    assert thread.daemon
    process.watchdog.stop()
    assert not thread.is_alive()


def test_an_exception_that_is_caught_has_left_the_training():
    process, seen = Run(1)[0], []

    def train():
        process.watchdog._loop = train.__code__
        process.watchdog._trains = threading.get_ident()
        seen.append(process.watchdog._own_record().status)

    train()
    assert [*seen, process.watchdog._own_record().status] == ["running", LEFT]

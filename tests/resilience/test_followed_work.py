"""The first rank works as long as it must, and the ranks that wait are not taken for hung."""

from __future__ import annotations

import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from cpt.errors import StorageError
from cpt.resilience import followed_work
from cpt.resilience.followed_work import MEETING_SECONDS, followed_by_all
from cpt.resilience.heartbeat import Beat, Observer, PhaseTimeouts, Process
from cpt.resilience.phase import PhaseClock
from data_pipeline.store.files import AtChunk
from tests.support.threaded_ranks import ThreadedRanks

RANKS = 3
LONG_SECONDS = 4 * 3600.0


class Time:
    """A clock that the work moves."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        patch.setattr(followed_work, "time", SimpleNamespace(monotonic=lambda: self.now))


class Run:
    """Ranks that follow a work, and what their watchdog would say."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.time = Time(patch)
        self.clocks = [PhaseClock() for _ in range(RANKS)]
        self.ranks = ThreadedRanks(RANKS, patch)
        timeouts = PhaseTimeouts(step=900.0, long=LONG_SECONDS)
        self.observer = Observer(RANKS, timeouts, straggler_ratio=0)
        self.hangs: list[Any] = []

    def follow(self, work: Callable[[AtChunk], None]) -> None:
        def take_part(rank: int) -> None:
            followed_by_all(self.ranks, self.clocks[rank], 7, work)  # type: ignore[arg-type]

        self.ranks.run(take_part)

    def look(self) -> None:
        """Look at the ranks as the watchdog of the first one does, once all are in one phase."""
        while len({clock.now().count for clock in self.clocks}) > 1:
            time.sleep(0.001)
        process = Process.this()
        beats = [Beat.of(clock.now(), self.time.now, process) for clock in self.clocks]
        self.observer.see(self.time.now, beats, None)
        hang = self.observer.find_hang(self.time.now)
        if hang is not None:
            self.hangs.append(hang)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    return Run(monkeypatch)


def test_work_of_ten_hours_is_no_hang_as_long_as_it_gets_on(run: Run) -> None:
    def work(at_chunk: AtChunk) -> None:
        while run.time.now < 36_000:
            run.time.now += 600
            at_chunk()
            run.look()

    run.follow(work)
    assert run.hangs == []
    places = {(clock.now().phase, clock.now().step, clock.now().count) for clock in run.clocks}
    assert places == {("export", 7, 1 + 60 + 1)}, "all ranks count the same phases"


def test_work_that_stands_still_is_found(run: Run) -> None:
    def work(at_chunk: AtChunk) -> None:
        at_chunk()
        for _ in range(60):
            run.time.now += 600
            run.look()

    run.follow(work)
    assert run.hangs and "all are in phase=export step=7" in run.hangs[0].text


def test_ranks_do_not_meet_at_every_chunk(run: Run) -> None:
    def work(at_chunk: AtChunk) -> None:
        for _ in range(30):
            run.time.now += MEETING_SECONDS / 10
            at_chunk()

    run.follow(work)
    assert run.clocks[0].now().count == 1 + 3 + 1


def test_error_of_the_work_reaches_all_ranks(run: Run) -> None:
    def work(at_chunk: AtChunk) -> None:
        run.time.now += 600
        at_chunk()
        raise OSError(28, "No space left on device")

    told: list[int] = []

    def take_part(rank: int) -> None:
        with pytest.raises(StorageError, match="No space left"):
            followed_by_all(run.ranks, run.clocks[rank], 0, work)  # type: ignore[arg-type]
        told.append(rank)

    run.ranks.run(take_part)
    assert sorted(told) == list(range(RANKS))

"""Work of the first rank that may take longer than a phase, while the other ranks wait for it.

    first rank     chunk, chunk, meeting, chunk, chunk, meeting, ... the end
    other ranks    meeting, meeting, ...

Decisions
    A rank that waits in one collective for hours meets the limit of its phase, or of its process
    group, however well the work goes. So all ranks meet now and then, and enter the phase anew.
    It is the work that calls a meeting, after a chunk: if it hangs, nobody enters a phase, and the
    watchdog ends the run as in any other phase.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
import torch.distributed as dist

from cpt.parallel.agreement import together
from cpt.resilience.phase import PhaseClock
from data_pipeline.store.files import AtChunk

MEETING_SECONDS = 60.0
"""Least time between two meetings."""
PHASE = "export"


class _Meetings:
    """The meetings of one work, as one rank sees them."""

    def __init__(self, group: dist.ProcessGroup, clock: PhaseClock, step: int) -> None:
        self._group = group
        self._clock = clock
        self._step = step
        self._met_at = time.monotonic()

    def hold(self, *, goes_on: bool = False) -> bool:
        """Meet the other ranks and return whether the work goes on.

        Args:
            goes_on: What the first rank knows.
        """
        told = torch.tensor(int(goes_on))
        dist.all_reduce(told, dist.ReduceOp.MAX, group=self._group)
        self._clock.enter(PHASE, self._step)
        self._met_at = time.monotonic()
        return bool(told)

    def at_chunk(self) -> None:
        """Hold a meeting, unless one was held a short time ago."""
        if time.monotonic() - self._met_at >= MEETING_SECONDS:
            self.hold(goes_on=True)


def followed_by_all(
    group: dist.ProcessGroup, clock: PhaseClock, step: int, work: Callable[[AtChunk], None]
) -> None:
    """Do work on the first rank, of any length; all ranks call this, and get its error.

    Args:
        group: All ranks, over gloo.
        clock: The phase of this rank, which becomes `PHASE`.
        step: The step of the phase.
        work: Calls what it is given after every chunk that is done. A chunk must take less than the
            long timeout of the watchdog.
    """
    clock.enter(PHASE, step)
    meetings = _Meetings(group, clock, step)

    def take_part() -> None:
        if dist.get_rank(group) != 0:
            while meetings.hold():
                pass
            return
        try:
            work(meetings.at_chunk)
        finally:
            meetings.hold()

    together(group, take_part)

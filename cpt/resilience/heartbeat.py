"""Who is behind: the positions of all ranks, judged without threads, stores or clocks of its own.

Decisions
    A rank hangs if it has not entered another phase for as long as its phase may take.  Blocked in
    a collective, all ranks stand still together; then those that do not even publish any more are
    named, else those that are furthest behind.
    A rank is a straggler in a step if most ranks were ahead of it, hence waited, for long compared
    with a usual step.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cpt.resilience.phase import PhaseRecord

LONG_PHASES = frozenset({"load", "save", "evaluate", "sample", "rollback", "export"})
"""Phases that may take the longer timeout."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Limits:
    """Seconds that a rank may stay in one phase."""

    step: float
    """Within a training step."""
    long: float
    """In one of `LONG_PHASES`."""

    def of(self, phase: str) -> float:
        """The limit of a phase."""
        return self.long if phase in LONG_PHASES else self.step


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """What a rank publishes."""

    count: int
    """Phases entered so far."""
    phase: str
    """Its phase."""
    step: int
    """Its step, counted from 1."""
    tick: float
    """Its clock: changes as long as the process runs."""
    pid: int
    """Its process."""
    host: str
    """Its node."""

    @classmethod
    def of(cls, record: PhaseRecord, tick: float, pid: int, host: str) -> Beat:
        """The beat of this process."""
        return cls(
            count=record.count,
            phase=record.phase,
            step=record.step,
            tick=tick,
            pid=pid,
            host=host,
        )

    def dump(self) -> str:
        """As JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def load(cls, text: str | bytes) -> Beat:
        """From JSON."""
        return cls(**json.loads(text))

    def place(self) -> str:
        """For people."""
        return f"phase={self.phase} step={self.step}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Hung:
    """A verdict."""

    ranks: list[int]
    """Those that are behind."""
    text: str
    """One line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Straggler:
    """A rank that made the others wait in one step."""

    rank: int
    """Who."""
    step: int
    """When."""
    phase: str
    """In which phase most of that time was lost."""
    seconds: float
    """How long most ranks waited for it."""
    ratio: float
    """Its step over the median step."""

    def describe(self) -> str:
        """One line."""
        return (
            f"straggler: rank {self.rank} took {self.ratio:.1f} x the median step in step {self.step} "
            f"({self.seconds:.1f} s behind in phase={self.phase})"
        )

    def event(self) -> dict[str, Any]:
        """For metrics.jsonl."""
        return {"event": "straggler", **asdict(self)}


@dataclass(kw_only=True, slots=True)
class _Seen:
    beat: Beat
    moved_at: float
    ticked_at: float
    was_behind: bool = False
    behind_seconds: dict[str, float] = field(default_factory=dict)
    """Time behind in the present step, by phase."""


class Observer:
    """All ranks as the last beats show them."""

    def __init__(self, world_size: int, limits: Limits, straggler_ratio: float) -> None:
        self._world_size, self._limits, self._straggler_ratio = world_size, limits, straggler_ratio
        self._seen: list[_Seen] = []
        self._saw_at = 0.0
        self._stragglers: list[Straggler] = []

    def forget(self) -> None:
        """Start anew: nothing can be said about a time in which the observer itself did not run."""
        self._seen = []

    def see(self, now: float, beats: Sequence[Beat], median_step_seconds: float | None) -> None:
        """Take in one beat of every rank.

        Args:
            now: The observer's clock in seconds.
            beats: By rank.
            median_step_seconds: What a step usually takes; None while unknown.
        """
        if not self._seen:
            self._seen = [_Seen(beat=beat, moved_at=now, ticked_at=now) for beat in beats]
            self._saw_at = now
            return
        elapsed, self._saw_at = now - self._saw_at, now
        counts = sorted(beat.count for beat in beats)
        middle = counts[len(counts) // 2]  # of two ranks the one ahead
        for rank, (seen, beat) in enumerate(zip(self._seen, beats, strict=True)):
            still = beat.count == seen.beat.count
            behind = beat.count == counts[0] < middle and beat.phase not in LONG_PHASES
            if (
                behind and seen.was_behind and still
            ):  # at two looks: beats of one moment do not arrive at once
                seen.behind_seconds[beat.phase] = seen.behind_seconds.get(beat.phase, 0.0) + elapsed
            seen.was_behind = behind
            if beat.step != seen.beat.step:
                self._end_of_step(rank, seen, median_step_seconds)
            seen.moved_at = seen.moved_at if still else now
            seen.ticked_at = seen.ticked_at if beat.tick == seen.beat.tick else now
            seen.beat = beat

    def _end_of_step(self, rank: int, seen: _Seen, median: float | None) -> None:
        by_phase, seen.behind_seconds = seen.behind_seconds, {}
        behind = sum(by_phase.values())
        if (
            median is None
            or self._straggler_ratio == 0
            or behind < (self._straggler_ratio - 1) * median
            or not behind
        ):
            return
        phase = max(by_phase, key=by_phase.__getitem__)
        self._stragglers.append(
            Straggler(
                rank=rank,
                step=seen.beat.step,
                phase=phase,
                seconds=behind,
                ratio=1 + behind / median,
            )
        )

    def take_stragglers(self) -> list[Straggler]:
        """Those found since the last call."""
        taken, self._stragglers = self._stragglers, []
        return taken

    def hung(self, now: float) -> Hung | None:
        """The verdict if no rank at the back has moved for longer than its phase may take."""
        if not self._seen:
            return None
        lowest = min(seen.beat.count for seen in self._seen)
        last = [rank for rank, seen in enumerate(self._seen) if seen.beat.count == lowest]
        if any(
            now - self._seen[rank].moved_at <= self._limits.of(self._seen[rank].beat.phase)
            for rank in last
        ):
            return None
        waited = min(now - self._seen[rank].moved_at for rank in last)
        # alive but blocked ranks tick at every look; half the time is more than any of them misses
        silent = [rank for rank, seen in enumerate(self._seen) if now - seen.ticked_at > waited / 2]
        named = silent or last
        if len(named) == self._world_size > 1:
            text = f"no rank is behind: all are in {self._seen[0].beat.place()}, for {waited:.0f} s"
            return Hung(ranks=[], text=text)
        parts = [f"rank {rank} last seen in {self._seen[rank].beat.place()}" for rank in named[:8]]
        parts += [f"and {len(named) - 8} ranks more"] if len(named) > 8 else []
        how = "not running" if silent else "not moving"
        others = Counter(
            seen.beat.place() for rank, seen in enumerate(self._seen) if rank not in set(named)
        )
        rest = ", ".join(f"{number} in {place}" for place, number in others.most_common(4))
        return Hung(
            ranks=named,
            text=f"{', '.join(parts)}, {how} for {waited:.0f} s; other ranks: {rest or 'none'}",
        )

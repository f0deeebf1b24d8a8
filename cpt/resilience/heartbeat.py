"""Judgment of who is behind: it sees one beat of every rank at a time and has no threads, stores or
clocks of its own.

Decisions
    A rank hangs if it has not entered another phase for as long as its phase may take. When one
    rank is stuck in a collective, all ranks stand still together. Then the ranks that no longer
    publish are named, or, if all publish, those that are furthest behind.
    A hung rank holds up all others within a step, so a run in which another rank moves and is two
    steps ahead does not hang: somebody keeps the beats of the rank that seems to stand still from
    the observer.
    A rank is a straggler in a step if most ranks were ahead of it, and hence waited, for long
    compared with a usual step.
"""

from __future__ import annotations

import os
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from cpt.resilience.environment import node_name
from cpt.resilience.phase import PhaseRecord
from cpt.resilience.processes import pid_namespace, start_ticks_of
from cpt.resilience.record_fields import MAX_NAME_LENGTH, RecordFields

LONG_PHASES = frozenset({"load", "save", "evaluate", "sample", "rollback", "export"})
"""Phases that may take the longer timeout."""
MOST_NAMED_RANKS = 8
"""Number of hung ranks that a message names one by one."""
MOST_STEPS_AHEAD = 1
"""How many steps a rank can be ahead of one that hangs."""
_LARGEST_NUMBER = 2**53


@dataclass(frozen=True, kw_only=True, slots=True)
class PhaseTimeouts:
    """Seconds that a rank may stay in one phase."""

    step: float
    """Timeout of the phases of a training step."""
    long: float
    """Timeout of each of `LONG_PHASES`."""

    def of(self, phase: str) -> float:
        """Return the timeout of a phase in seconds."""
        return self.long if phase in LONG_PHASES else self.step


@dataclass(frozen=True, kw_only=True, slots=True)
class Process:
    """The process of a rank and where it runs."""

    pid: int
    host: str
    """Host name of its machine."""
    node: str
    """What the batch system calls this machine."""
    machine: str
    """Boot of the machine and pid namespace in which `pid` means something."""
    started: str
    """Start of the process in clock ticks since boot, because process ids are used again."""

    @classmethod
    def this(cls) -> Process:
        """Return the present process."""
        return cls(
            pid=os.getpid(),
            host=socket.gethostname()[:MAX_NAME_LENGTH],
            node=node_name()[:MAX_NAME_LENGTH],
            machine=pid_namespace()[:MAX_NAME_LENGTH],
            started=start_ticks_of(os.getpid()),
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Beat:
    """A rank's sign of life, as it publishes it."""

    count: int
    """Number of phases entered so far."""
    phase: str
    """Present phase of the rank."""
    step: int
    """Optimizer step in progress, counted from 1."""
    tick: float
    """Clock of the rank, which moves as long as the process runs."""
    pid: int
    """Process id of the rank."""
    host: str
    """Host name of the rank's machine."""
    node: str = ""
    """What the batch system calls this machine."""
    machine: str = ""
    """Boot of the machine and pid namespace in which `pid` means something."""
    started: str = ""
    """Start of the process in clock ticks since boot, because process ids are used again."""

    @classmethod
    def of(cls, record: PhaseRecord, tick: float, process: Process) -> Beat:
        """Return the beat of a rank in the recorded phase."""
        return cls(
            count=record.count,
            phase=record.phase,
            step=record.step,
            tick=tick,
            pid=process.pid,
            host=process.host,
            node=process.node,
            machine=process.machine,
            started=process.started,
        )

    def to_record(self) -> dict[str, Any]:
        """Return the beat as JSON values."""
        return asdict(self)

    @classmethod
    def from_record(cls, record: Any) -> Beat:
        """Return the beat that `to_record` turned into JSON values.

        Raises:
            ValueError: a field has a type or a value that no beat has.
        """
        fields = RecordFields(record)
        beat = cls(
            count=fields.integer("count", 0, _LARGEST_NUMBER),
            phase=fields.text("phase"),
            step=fields.integer("step", 0, _LARGEST_NUMBER),
            tick=fields.number("tick"),
            pid=fields.integer("pid", 1, 2**31 - 1),
            host=fields.text("host"),
            node=fields.text("node"),
            machine=fields.text("machine"),
            started=fields.text("started"),
        )
        fields.end()
        return beat

    def location(self) -> str:
        """Return the phase and the step for people."""
        return f"phase={self.phase} step={self.step}"


@dataclass(frozen=True, kw_only=True, slots=True)
class Hang:
    """A run that no longer moves, and the ranks that it waits for."""

    ranks: list[int]
    """Ranks that are behind; empty if all stand in the same phase."""
    text: str
    """Description in one line."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Straggler:
    """A rank that made the others wait in one step."""

    rank: int
    """The rank that was behind."""
    step: int
    """The optimizer step, counted from 1."""
    phase: str
    """Phase in which most of the time was lost."""
    seconds: float
    """How long most ranks waited for it."""
    ratio: float
    """Duration of its step over that of the median step."""

    def describe(self) -> str:
        """Return one line for people."""
        return (
            f"straggler: rank {self.rank} took {self.ratio:.1f} x the median step in step "
            f"{self.step} ({self.seconds:.1f} s behind in phase={self.phase})"
        )

    def event(self) -> dict[str, Any]:
        """Return the event for metrics.jsonl."""
        return {"event": "straggler", **asdict(self)}


@dataclass(kw_only=True, slots=True)
class _SeenRank:
    """The observer's knowledge of one rank; times are seconds of the observer's clock."""

    beat: Beat
    """Its last beat."""
    moved_at: float
    """Time at which it was last seen to enter a phase."""
    ticked_at: float
    """Time at which its clock was last seen to move."""
    was_behind: bool = False
    """Whether it was behind at the last look."""
    behind_seconds: dict[str, float] = field(default_factory=dict)
    """Time behind in the present step, by phase."""


class Observer:
    """All ranks as their last beats show them."""

    def __init__(self, world_size: int, timeouts: PhaseTimeouts, straggler_ratio: float) -> None:
        """Start without a beat.

        Args:
            world_size: Number of ranks.
            timeouts: How long a phase may take.
            straggler_ratio: How many median steps a step may take; 0 looks for no stragglers.
        """
        self._world_size = world_size
        self._timeouts = timeouts
        self._straggler_ratio = straggler_ratio
        self._seen: list[_SeenRank] = []
        self._saw_at = 0.0
        self._stragglers: list[Straggler] = []

    def forget(self) -> None:
        """Start anew, because the observer did not run itself for some time."""
        self._seen = []

    def see(self, now: float, beats: Sequence[Beat], median_step_seconds: float | None) -> None:
        """Take in one beat of every rank.

        Args:
            now: The observer's clock in seconds.
            beats: Beats by rank.
            median_step_seconds: Usual duration of a step; None while unknown.
        """
        if not self._seen:
            self._seen = [_SeenRank(beat=beat, moved_at=now, ticked_at=now) for beat in beats]
            self._saw_at = now
            return
        elapsed = now - self._saw_at
        self._saw_at = now
        counts = sorted(beat.count for beat in beats)
        lowest = counts[0]
        middle = counts[len(counts) // 2]  # of two ranks the one ahead
        for rank, (seen, beat) in enumerate(zip(self._seen, beats, strict=True)):
            stands_still = beat.count == seen.beat.count
            is_behind = beat.count == lowest < middle and beat.phase not in LONG_PHASES
            # Beats of one moment do not arrive together, so only a rank that is behind at two looks
            # counts as behind.
            if is_behind and seen.was_behind and stands_still:
                seen.behind_seconds[beat.phase] = seen.behind_seconds.get(beat.phase, 0.0) + elapsed
            seen.was_behind = is_behind
            if beat.step != seen.beat.step:
                self._end_step(rank, seen, median_step_seconds)
            if not stands_still:
                seen.moved_at = now
            if beat.tick != seen.beat.tick:
                seen.ticked_at = now
            seen.beat = beat

    def _end_step(self, rank: int, seen: _SeenRank, median: float | None) -> None:
        """Note a straggler if the rank lost much time in the step that it has just ended."""
        by_phase = seen.behind_seconds
        seen.behind_seconds = {}
        behind = sum(by_phase.values())
        if median is None or self._straggler_ratio == 0 or behind == 0:
            return
        if behind < (self._straggler_ratio - 1) * median:
            return
        self._stragglers.append(
            Straggler(
                rank=rank,
                step=seen.beat.step,
                phase=max(by_phase, key=by_phase.__getitem__),
                seconds=behind,
                ratio=1 + behind / median,
            )
        )

    def take_stragglers(self) -> list[Straggler]:
        """Return the stragglers found since the last call."""
        taken = self._stragglers
        self._stragglers = []
        return taken

    def find_hang(self, now: float) -> Hang | None:
        """Return the hang if no rank at the back has moved for longer than its phase may take."""
        if not self._seen:
            return None
        lowest = min(seen.beat.count for seen in self._seen)
        last = [rank for rank, seen in enumerate(self._seen) if seen.beat.count == lowest]
        for rank in last:
            if now - self._seen[rank].moved_at <= self._timeouts.of(self._seen[rank].beat.phase):
                return None
        if self._is_another_ahead(now, last):
            return None
        waited = min(now - self._seen[rank].moved_at for rank in last)
        # A rank that is alive but blocked ticks at every look. None misses looks for half of the
        # whole wait.
        silent = [rank for rank, seen in enumerate(self._seen) if now - seen.ticked_at > waited / 2]
        named = silent or last
        if len(named) == self._world_size > 1:
            location = self._seen[0].beat.location()
            return Hang(
                ranks=[], text=f"no rank is behind: all are in {location}, for {waited:.0f} s"
            )
        how = "not running" if silent else "not moving"
        text = f"{self._name_ranks(named)}, {how} for {waited:.0f} s; {self._name_others(named)}"
        return Hang(ranks=named, text=text)

    def _is_another_ahead(self, now: float, ranks: Sequence[int]) -> bool:
        """Return whether a rank moves that is further ahead of these than a hang lets it be."""
        newest_step = max(self._seen[rank].beat.step for rank in ranks)
        for seen in self._seen:
            moves = now - seen.moved_at <= self._timeouts.of(seen.beat.phase)
            if moves and seen.beat.step > newest_step + MOST_STEPS_AHEAD:
                return True
        return False

    def find_lost(self, now: float, seconds: float) -> list[int]:
        """Return the ranks whose process has given no sign of life for a time."""
        return [rank for rank, seen in enumerate(self._seen) if now - seen.ticked_at > seconds]

    def describe_lost(self, ranks: Sequence[int]) -> str:
        """Return which ranks are lost, and where they were."""
        nodes = sorted({self._seen[rank].beat.node for rank in ranks})
        return (
            f"{self._name_ranks(list(ranks))}, with no sign of life since then (on "
            f"{', '.join(nodes)}). That machine, its network or its processes are gone"
        )

    def beat_of(self, rank: int) -> Beat:
        """Return the newest beat of a rank."""
        return self._seen[rank].beat

    def _name_ranks(self, ranks: list[int]) -> str:
        parts = []
        for rank in ranks[:MOST_NAMED_RANKS]:
            parts.append(f"rank {rank} last seen in {self._seen[rank].beat.location()}")
        if len(ranks) > MOST_NAMED_RANKS:
            parts.append(f"and {len(ranks) - MOST_NAMED_RANKS} ranks more")
        return ", ".join(parts)

    def _name_others(self, ranks: list[int]) -> str:
        """Count the ranks that are not among `ranks` by where they are."""
        locations: Counter[str] = Counter()
        for rank, seen in enumerate(self._seen):
            if rank not in ranks:
                locations[seen.beat.location()] += 1
        parts = [f"{count} in {location}" for location, count in locations.most_common(4)]
        return f"other ranks: {', '.join(parts) or 'none'}"

"""The mix over a run: an append-only list of segments.

Decisions
    A segment says from which step on which weights hold. What is in the ledger never changes: an
    edit of the mix is one more segment, so the batches of past steps stay what they were.
    A segment holds all that the choice of rows needs, and the settings of its mix, so that an edit
    can be shown.
    Every segment keeps the floors and ceilings (`languages`) of its mix, whether it comes from a
    mix YAML, an accepted edit, or the guard that raises replay. So at every prefix of the run a
    language has its floor, up to `slack_rows`.
    Weights, limits and labels may be edited, sources added, and a source retired with weight 0. The
    rows of a source that was trained on may not change: places in it would mean other text, and
    rows would be lost or repeated.
    A schedule is written into the ledger at the start, one segment for each phase, so segments may
    lie in the future. Those have given no row: an accepted edit, another length of the run and the
    guard replace them, and never what lies behind. The borders of phases count batches from the
    beginning of the run, given-up ones included.
    A segment without a phase is stored as format 2 stored it, so the ledger of a mix without a
    schedule has the bytes that it always had.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.config.language_limits import WEIGHT_SUM_TOLERANCE
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.errors import ConfigError
from data_pipeline.mixture.phases import Phase, between, phases_of
from data_pipeline.mixture.settings import Settings, describe_changes, mix_settings

FORMAT_VERSION = 2
"""Format of a ledger without phases."""
PHASE_FORMAT_VERSION = 3
"""Format of a ledger that has segments with phases."""
_FIXED = ("seq_len", "seed")
"""Settings that decide what a row is and in which order rows come; no edit may touch them."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Segment:
    """Weights that hold from `start_step` on."""

    start_step: int
    """Optimizer step, counted from 0."""
    weights: Mapping[str, float]
    """Share of the predicted tokens by source name; sums to 1."""
    max_epochs: Mapping[str, float]
    """Epochs by source name; a source that is not here repeats without limit."""
    mix_hash: str
    """`mix_hash` of the mix that the weights come from."""
    settings: Settings = field(default_factory=dict)
    """`mix_settings` of that mix."""
    rows: Mapping[str, str] = field(default_factory=dict)
    """Hash of the training rows by source name (`BuildManifest.row_hashes`)."""
    phase: str = ""
    """Name of the phase of the schedule; empty without one."""
    to_weights: Mapping[str, float] | None = None
    """Weights at `stop_step`, to which those of the segment change in proportion to the tokens;
    None if they stay."""
    stop_step: int | None = None
    """Planned step after the last one of the phase; None without a schedule."""
    total_steps: int | None = None
    """Steps of the run that the schedule was laid over; None without a schedule."""

    def ends(self) -> tuple[Mapping[str, float], ...]:
        """Return the weights at the beginning, and those at the end if they change."""
        return (self.weights,) if self.to_weights is None else (self.weights, self.to_weights)

    def weights_at(self, step: int) -> dict[str, float]:
        """Return the weights at a step of the segment, counted from 0, up to whole rows."""
        if self.to_weights is None or self.stop_step is None:
            return dict(self.weights)
        part = (step - self.start_step) / (self.stop_step - self.start_step)
        return between(self.weights, self.to_weights, part)

    def from_step(self, step: int) -> Segment:
        """Return what is left of the segment from a step on; all of it if it begins later."""
        if self.to_weights is None or self.stop_step is None or step <= self.start_step:
            return self
        to_weights = self.to_weights if step < self.stop_step else None
        return dataclasses.replace(
            self, start_step=step, weights=self.weights_at(step), to_weights=to_weights
        )

    def drawn_sources(self) -> list[str]:
        """Return the sources that have a weight somewhere in the segment."""
        return [name for name in self.weights if any(end[name] > 0 for end in self.ends())]

    def languages(self) -> dict[str, Mapping[str, float]]:
        """Return the bounds on each language: those of the mix, or of the phase in their place."""
        bounds = dict(self.settings.get("languages", {}))
        for phase in self.settings.get("schedule", []):
            if phase["name"] == self.phase:
                bounds |= phase["languages"]
        return bounds

    def phase_max_epochs(self) -> dict[str, float]:
        """Return the epochs that the phase allows, by source; a source not here has no ceiling."""
        for phase in self.settings.get("schedule", []):
            if phase["name"] == self.phase:
                return dict(phase.get("max_epochs", {}))
        return {}

    def to_json(self) -> dict[str, Any]:
        """Return the segment as JSON values, without what it does not have."""
        plain = dataclasses.asdict(self)
        for key in ("phase", "to_weights", "stop_step", "total_steps"):
            if plain[key] in (None, ""):
                del plain[key]
        return plain

    def sources_of(self, language: str) -> list[str]:
        """Return the sources of a language that have a weight, by the labels of this mix."""
        labels = self.settings.get("sources", {})
        found = []
        for name in self.drawn_sources():
            if labels.get(name, {}).get("language") == language:
                found.append(name)
        return found

    def slack_rows(self, language: str) -> int:
        """Return by how many rows the tokens of a language may miss their share; see `Ledger`."""
        num_own = len(self.sources_of(language))
        return min(num_own, len(self.drawn_sources()) - num_own)

    def broken_limits(self) -> Iterator[str]:
        """Yield a problem for each floor or ceiling of the mix that the weights do not keep.

        Shares change on straight lines, so bounds that hold at both ends hold between.
        """
        for language, bounds in self.languages().items():
            names = self.sources_of(language)
            low = bounds.get("min_share", 0.0)
            high = bounds.get("max_share", 1.0)
            for weights, step in zip(self.ends(), (self.start_step, self.stop_step), strict=False):
                share = math.fsum(weights[name] for name in names)
                if not low - WEIGHT_SUM_TOLERANCE <= share <= high + WEIGHT_SUM_TOLERANCE:
                    yield (
                        f"mix ledger: weights from step {step} give language '{language}' a share "
                        f"of {share:.2%}, the mix allows {low:.2%} to {high:.2%}. Change the "
                        "weights, or the limit in the mix's `languages`."
                    )


@dataclass(frozen=True, slots=True)
class Ledger:
    """All segments of a run, in the order of their first steps."""

    segments: tuple[Segment, ...]

    def __post_init__(self) -> None:
        starts = [segment.start_step for segment in self.segments]
        if not starts or starts[0] != 0:
            raise ConfigError(
                f"mix ledger: the first segment starts at step {starts[:1]}, must start at 0."
            )
        if any(later <= earlier for earlier, later in itertools.pairwise(starts)):
            raise ConfigError(
                f"mix ledger: start steps are {starts}, must increase. The ledger is append-only."
            )
        problems: list[str] = []
        for segment in self.segments:
            _check_shares(segment)
            problems += segment.broken_limits()
        if problems:
            raise ConfigError(problems)

    @classmethod
    def start(
        cls, mix: MixConfig, rows: Mapping[str, str] | None = None, total_steps: int | None = None
    ) -> Ledger:
        """Return the ledger of a new run.

        Args:
            mix: The mix.
            rows: As in `Segment`.
            total_steps: Steps of the run, which a schedule divides; a run of 0 steps has no phases.

        Raises:
            ConfigError: the run cannot follow the schedule.
        """
        return cls(tuple(_segments(mix, 0, rows, total_steps)))

    def append(
        self,
        mix: MixConfig,
        start_step: int,
        rows: Mapping[str, str] | None = None,
        total_steps: int | None = None,
    ) -> Ledger:
        """Return this ledger with a mix from `start_step` on, in place of phases in the future.

        Raises:
            ConfigError: `start_step` is not after the start of the last segment that stays, or the
                run cannot follow the schedule.
        """
        return Ledger((*self._before(start_step), *_segments(mix, start_step, rows, total_steps)))

    def _before(self, step: int) -> tuple[Segment, ...]:
        """Return the segments without the phases that begin at a step or later."""
        kept = []
        for segment in self.segments:
            if not segment.phase or segment.start_step < step:
                kept.append(segment)
        return tuple(kept)

    def segment_at(self, step: int) -> Segment:
        """Return the segment of a step."""
        starts = [segment.start_step for segment in self.segments]
        return self.segments[bisect.bisect_right(starts, step) - 1]

    def phase_start(self, step: int) -> int:
        """Return the first step of the phase of a step, whatever cut it into segments since."""
        number = self.segments.index(self.segment_at(step))
        phase = self.segments[number].phase
        while phase and number and self.segments[number - 1].phase == phase:
            number -= 1
        return self.segments[number].start_step

    def capped_spans(self, first_step: int, stop_step: int) -> list[tuple[int, int]]:
        """Return (first step, stop) of the phases with ceilings of epochs between two steps."""
        spans: list[tuple[int, int]] = []
        for segment, start, stop in self._parts(first_step, stop_step):
            if not segment.phase_max_epochs():
                continue
            if spans and self.phase_start(start) == self.phase_start(spans[-1][0]):
                spans[-1] = (spans[-1][0], stop)
            else:
                spans.append((start, stop))
        return spans

    def mean_weights(self, first_step: int, stop_step: int) -> dict[str, float]:
        """Return the mean share of every source over some steps, at least one."""
        sums = dict.fromkeys(self.segments[-1].weights, 0.0)
        for segment, start, stop in self._parts(first_step, stop_step):
            # the mean over a straight line is that of its middle
            middle = between(segment.weights_at(start), segment.weights_at(stop), 0.5)
            for name, weight in middle.items():
                sums[name] = sums.get(name, 0.0) + weight * (stop - start)
        return {name: total / (stop_step - first_step) for name, total in sums.items()}

    def _parts(self, first_step: int, stop_step: int) -> Iterator[tuple[Segment, int, int]]:
        """Yield the segments between two steps, each with its first step there and its stop."""
        for index, segment in enumerate(self.segments):
            start = max(first_step, segment.start_step)
            stop = stop_step
            if index + 1 < len(self.segments):
                stop = min(stop, self.segments[index + 1].start_step)
            if start < stop:
                yield segment, start, stop

    def planned_segment(self, mix: MixConfig, step: int) -> Segment:
        """Return the segment at a step as the mix plans it, without what the guard did.

        Args:
            mix: The mix of the last segment.
            step: The step at which the segment is to begin.
        """
        return self._planned_from(mix, step)[0]

    def _planned_from(self, mix: MixConfig, step: int) -> list[Segment]:
        last = self.segments[-1]
        return _segments(mix, step, last.rows, last.total_steps or 0)

    def adjust(
        self,
        mix: MixConfig,
        start_step: int,
        adjusted: Callable[[Segment, Mapping[str, float]], Mapping[str, float]],
    ) -> Ledger:
        """Return this ledger with adjusted weights in the present and all future phases.

        The guard moves replay this way. It starts from the weights that are planned, so what it
        did before does not add up, and phases that come later are adjusted as much. Where that
        changes nothing, the ledger stays: a resumed run cuts no segment that an unbroken one has
        not.

        Args:
            mix: The mix of the last segment.
            start_step: First step with the adjusted weights.
            adjusted: (segment, planned weights) -> the weights in their place.
        """
        present = self.segment_at(start_step)
        kept = self.segments[: self.segments.index(present)]
        stored = self.segments[len(kept) :]

        def plan_from(step: int) -> list[Segment]:
            found = []
            for segment in self._planned_from(mix, step):
                weights = [dict(adjusted(segment, end)) for end in segment.ends()]
                to_weights = weights[1] if len(weights) > 1 else None
                found.append(
                    dataclasses.replace(segment, weights=weights[0], to_weights=to_weights)
                )
            return found

        if _are_same(plan_from(present.start_step), stored):
            return self
        if present.start_step < start_step:
            kept = (*kept, present)
        return Ledger((*kept, *plan_from(start_step)))

    def to_json(self) -> dict[str, Any]:
        """Return the ledger as JSON values."""
        return {
            "format_version": PHASE_FORMAT_VERSION if self.has_phases else FORMAT_VERSION,
            "segments": [segment.to_json() for segment in self.segments],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Ledger:
        """Return the ledger that `to_json` wrote.

        Raises:
            ConfigError: the value is no ledger of this format.
        """
        if value.get("format_version") not in (FORMAT_VERSION, PHASE_FORMAT_VERSION):
            raise ConfigError(
                f"mix ledger: format version {value.get('format_version')}, must be "
                f"{FORMAT_VERSION} or {PHASE_FORMAT_VERSION}. Go on with the version of this "
                "package that wrote it."
            )
        try:
            return cls(tuple(Segment(**segment) for segment in value["segments"]))
        except (TypeError, KeyError, AttributeError) as error:
            raise ConfigError(f"mix ledger: lacks or misnames a key: {error}.") from error

    def slack_rows(self, language: str) -> int:
        """Return by how many rows the tokens of a language may miss their share at any prefix.

        In a segment every source is within one row of its share. So n sources together are within n
        rows, and also within as many rows as there are other sources, because the others have what
        these miss. A segment starts a new account.
        """
        return sum(segment.slack_rows(language) for segment in self.segments)

    @property
    def has_phases(self) -> bool:
        """Whether any segment is a phase of a schedule."""
        return any(segment.phase for segment in self.segments)

    @property
    def ledger_hash(self) -> str:
        """Hex sha256 of all segments."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def _check_shares(segment: Segment) -> None:
    for weights in segment.ends():
        total = math.fsum(weights.values())
        none_negative = all(weight >= 0 for weight in weights.values())
        if not none_negative or abs(total - 1) > WEIGHT_SUM_TOLERANCE:
            raise ConfigError(
                f"mix ledger: weights from step {segment.start_step} are not shares that sum to 1."
            )
    if segment.to_weights is None:
        return
    stop = segment.stop_step
    if segment.to_weights.keys() != segment.weights.keys() or stop is None:
        raise ConfigError(
            f"mix ledger: the change from step {segment.start_step} on lacks its end, or names "
            "other sources there."
        )
    if stop <= segment.start_step:
        raise ConfigError(
            f"mix ledger: the change from step {segment.start_step} on ends at step {stop}."
        )


def _are_same(first: Sequence[Segment], second: Sequence[Segment]) -> bool:
    """Return whether two stretches of a ledger give the same rows."""
    if len(first) != len(second):
        return False
    for one, other in zip(first, second, strict=True):
        if (one.start_step, one.stop_step) != (other.start_step, other.stop_step):
            return False
        if len(one.ends()) != len(other.ends()):
            return False
        if not all(map(same_weights, one.ends(), other.ends())):
            return False
    return True


def resume_ledger(
    stored: Mapping[str, Any],
    mix: MixConfig,
    next_step: int,
    *,
    accept_change: bool,
    rows: Mapping[str, str] | None = None,
    total_steps: int | None = None,
) -> Ledger:
    """Return the ledger to go on with: the stored one, or with another future after an edit.

    More or fewer steps of a run with a schedule are an edit if they move a phase to come.

    Args:
        stored: `Ledger.to_json` of the run so far.
        mix: The mix as it is now.
        next_step: The first step that is still to be done; an accepted edit starts there.
        accept_change: Whether the user agrees to go on with an edited mix.
        rows: `BuildManifest.row_hashes` of the present build; None leaves out the check that no
            rows changed.
        total_steps: Steps of the run as it is now, which a schedule divides.

    Raises:
        ConfigError: the mix was edited and the edit was not accepted (the message shows it line by
            line), or it would lose or repeat rows, which no flag allows.
    """
    ledger = Ledger.from_json(stored)
    last = ledger.segments[-1]
    if last.start_step > next_step and not last.phase:
        raise ConfigError(
            f"mix ledger: its last segment starts at step {last.start_step}, after step "
            f"{next_step}."
        )
    _check_drawn_sources(ledger, mix, rows, next_step)
    same_rows = rows is None or rows.items() <= dict(last.rows).items()
    moved = _moved_phases(last, mix, next_step, total_steps)
    if mix_hash(mix) == last.mix_hash and same_rows and not moved:
        return ledger
    changes = describe_changes(last.settings, mix_settings(mix))
    if not changes and same_rows and not moved:
        return ledger  # another version wrote it, which did not know every key
    if not accept_change:
        for name in _sources_with_other_rows(last, rows):
            changes.append(f"rows of source {name}: others than before")
        raise ConfigError(
            [
                f"The data mix was edited since step {_edited_since(ledger)} of this run:",
                *(f"  {line}" for line in [*changes, *moved]),
                f"Change it back, or go on with the edited mix from step {next_step} on: "
                "--set data.accept_mix_change=true",
            ]
        )
    present = ledger.segment_at(next_step)
    if present.start_step < next_step:
        return ledger.append(mix, next_step, rows, total_steps)
    # no row was drawn from the present segment: the new one takes its place
    kept = ledger.segments[: ledger.segments.index(present)]
    if not kept:
        return Ledger.start(mix, rows, total_steps)
    return Ledger(kept).append(mix, next_step, rows, total_steps)


def _edited_since(ledger: Ledger) -> int:
    """Return the first step of the mix of the last segment."""
    last = ledger.segments[-1]
    if not last.phase:
        return last.start_step
    since = last.start_step
    for segment in reversed(ledger.segments):
        if segment.mix_hash != last.mix_hash:
            break
        since = segment.start_step
    return since


def _moved_phases(
    last: Segment, mix: MixConfig, next_step: int, total_steps: int | None
) -> list[str]:
    """Return a line for each phase to come that another length of the run moves."""
    before = last.total_steps
    has_both = before is not None and total_steps is not None
    if not has_both or before == total_steps or mix_hash(mix) != last.mix_hash:
        return []
    assert before is not None and total_steps is not None
    old = _spans(phases_of(mix, before), next_step)
    new = _spans(phases_of(mix, total_steps), next_step)
    lines = []
    for name in dict.fromkeys([*old, *new]):
        if old.get(name) != new.get(name):
            lines.append(
                f"phase {name}: {_span_text(old.get(name))} -> {_span_text(new.get(name))} "
                f"(of {total_steps} steps, {before} before)"
            )
    return lines


def _spans(phases: Sequence[Phase], next_step: int) -> dict[str, tuple[int, int | None]]:
    """Return (first step, end) of the phases from a step on.

    That a constant last phase ends later changes no row: its end is None.
    """
    spans: dict[str, tuple[int, int | None]] = {}
    for phase in phases:
        if phase.stop_step <= next_step:
            continue
        is_open = phase is phases[-1] and phase.to_weights is None
        begin = phase.start_step
        if phase.to_weights is None:
            begin = max(begin, next_step)
        spans[phase.name] = (begin, None if is_open else phase.stop_step)
    return spans


def _span_text(span: tuple[int, int | None] | None) -> str:
    if span is None:
        return "none"
    start, stop = span
    return f"from step {start} on" if stop is None else f"steps {start} to {stop}"


def same_weights(first: Mapping[str, float], second: Mapping[str, float]) -> bool:
    """Return whether the weights of two mixes are the same, up to rounding."""
    if first.keys() != second.keys():
        return False
    return all(
        math.isclose(weight, second[name], rel_tol=1e-9, abs_tol=1e-12)
        for name, weight in first.items()
    )


def mix_hash(mix: MixConfig) -> str:
    """Return the hex sha256 of the settings of a mix.

    Paths do not count: a change of what the files hold is for `origin.fingerprint` to notice.
    """
    return hashlib.sha256(json.dumps(mix_settings(mix), sort_keys=True).encode()).hexdigest()


def _sources_with_other_rows(segment: Segment, rows: Mapping[str, str] | None) -> list[str]:
    """Return the sources whose rows are not those that the segment knows."""
    found = []
    for name, value in (rows or {}).items():
        if segment.rows.get(name, value) != value:
            found.append(name)
    return found


def _check_drawn_sources(
    ledger: Ledger, mix: MixConfig, rows: Mapping[str, str] | None, next_step: int
) -> None:
    """Refuse a mix in which something that past steps were drawn from is gone or changed.

    Raises:
        ConfigError: it is; the message names all that is.
    """
    settings = ledger.segments[-1].settings
    problems = []
    for key in _FIXED:
        if key in settings and settings[key] != getattr(mix, key):
            problems.append(
                f"{key}: was {settings[key]}, is {getattr(mix, key)}. It decides what past and "
                "future rows are: change it back, or start another run with a new --run_dir."
            )
    names = [source.name for source in mix.sources]
    for name in sorted(_drawn_sources(ledger, next_step)):
        known = _known_rows(ledger, name)
        if name not in names:
            problems.append(
                f"source '{name}' was trained on and is no longer in the mix. Keep it, with "
                "weight: 0, so that past steps stay known."
            )
        elif rows is not None and known is not None and rows.get(name) != known:
            problems.append(
                f"source '{name}' was trained on and has other rows now: its text, or what decides "
                "its rows, was changed. Change it back, and add new text as a source of its own "
                "after the others."
            )
    if problems:
        raise ConfigError(problems)


def _drawn_sources(ledger: Ledger, next_step: int) -> set[str]:
    """Return the sources that have a weight in any segment but the phases to come."""
    drawn: set[str] = set()
    for segment in ledger.segments:
        if not segment.phase or segment.start_step < next_step:
            drawn.update(segment.drawn_sources())
    return drawn


def _known_rows(ledger: Ledger, source_name: str) -> str | None:
    """Return the hash of a source's rows that the latest segment to know it has."""
    for segment in reversed(ledger.segments):
        if source_name in segment.rows:
            return segment.rows[source_name]
    return None


def _segments(
    mix: MixConfig, start_step: int, rows: Mapping[str, str] | None, total_steps: int | None
) -> list[Segment]:
    """Return the segments of a mix from a step on: one, or one for each phase to come."""
    whole = _segment(mix, start_step, rows)
    if not mix.schedule or total_steps == 0:
        return [whole]
    if total_steps is None:
        raise ValueError("a schedule is laid over the steps of a run: give total_steps")
    phases = phases_of(mix, total_steps)
    segments = []
    for phase in phases:
        if phase.stop_step <= start_step and phase is not phases[-1]:
            continue
        first_step = max(start_step, phase.start_step)
        weights: Mapping[str, float] = phase.weights_at(first_step)
        to_weights = phase.to_weights if first_step < phase.stop_step else None
        segments.append(
            dataclasses.replace(
                whole,
                start_step=first_step,
                weights=weights,
                phase=phase.name,
                to_weights=to_weights,
                stop_step=phase.stop_step,
                total_steps=total_steps,
            )
        )
    return segments


def _segment(mix: MixConfig, start_step: int, rows: Mapping[str, str] | None) -> Segment:
    weights = {}
    max_epochs = {}
    for source in mix.sources:
        if source.epochs is not None and not source.weight:
            raise ValueError("the weights of this mix follow from its build: `epochs.with_weights`")
        weights[source.name] = source.weight
        if source.max_epochs is not None:
            max_epochs[source.name] = source.max_epochs
    return Segment(
        start_step=start_step,
        weights=weights,
        max_epochs=max_epochs,
        mix_hash=mix_hash(mix),
        settings=mix_settings(mix),
        rows=dict(rows or {}),
    )

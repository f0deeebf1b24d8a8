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
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.config.mix_config import WEIGHT_SUM_TOLERANCE, MixConfig
from data_pipeline.errors import ConfigError
from data_pipeline.mixture.settings import Settings, describe_changes, mix_settings

FORMAT_VERSION = 2
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

    def sources_of(self, language: str) -> list[str]:
        """Return the sources of a language that have a weight, by the labels of this mix."""
        labels = self.settings.get("sources", {})
        found = []
        for name, weight in self.weights.items():
            if weight > 0 and labels.get(name, {}).get("language") == language:
                found.append(name)
        return found

    def broken_limits(self) -> Iterator[str]:
        """Yield a problem for each floor or ceiling of the mix that the weights do not keep."""
        for language, bounds in self.settings.get("languages", {}).items():
            share = math.fsum(self.weights[name] for name in self.sources_of(language))
            low = bounds.get("min_share", 0.0)
            high = bounds.get("max_share", 1.0)
            if not low - WEIGHT_SUM_TOLERANCE <= share <= high + WEIGHT_SUM_TOLERANCE:
                yield (
                    f"mix ledger: weights from step {self.start_step} give language '{language}' a "
                    f"share of {share:.2%}, the mix allows {low:.2%} to {high:.2%}. Change the "
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
    def start(cls, mix: MixConfig, rows: Mapping[str, str] | None = None) -> Ledger:
        """Return the ledger of a new run; `rows` as in `Segment`."""
        return cls((_segment(mix, 0, rows),))

    def append(
        self, mix: MixConfig, start_step: int, rows: Mapping[str, str] | None = None
    ) -> Ledger:
        """Return this ledger and one more segment.

        Raises:
            ConfigError: `start_step` is not after the start of the last segment.
        """
        return Ledger((*self.segments, _segment(mix, start_step, rows)))

    def reweigh(self, start_step: int, weights: Mapping[str, float]) -> Ledger:
        """Return this ledger with other weights from `start_step` on, which no mix names.

        The guard raises replay this way. A last segment that starts at the same step has given no
        row yet, and is replaced.

        Raises:
            ConfigError: `start_step` is before the start of the last segment, or the weights are
                not shares.
        """
        last = self.segments[-1]
        kept = self.segments
        if last.start_step == start_step:
            kept = self.segments[:-1]
        segment = dataclasses.replace(last, start_step=start_step, weights=dict(weights))
        return Ledger((*kept, segment))

    def to_json(self) -> dict[str, Any]:
        """Return the ledger as JSON values."""
        return {
            "format_version": FORMAT_VERSION,
            "segments": [dataclasses.asdict(segment) for segment in self.segments],
        }

    @classmethod
    def from_json(cls, value: Mapping[str, Any]) -> Ledger:
        """Return the ledger that `to_json` wrote.

        Raises:
            ConfigError: the value is no ledger of this format.
        """
        if value.get("format_version") != FORMAT_VERSION:
            raise ConfigError(
                f"mix ledger: format version {value.get('format_version')}, must be "
                f"{FORMAT_VERSION}. Go on with the version of this package that wrote it."
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
        rows = 0
        for segment in self.segments:
            num_sources = sum(weight > 0 for weight in segment.weights.values())
            num_own = len(segment.sources_of(language))
            rows += min(num_own, num_sources - num_own)
        return rows

    @property
    def ledger_hash(self) -> str:
        """Hex sha256 of all segments."""
        return hashlib.sha256(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def _check_shares(segment: Segment) -> None:
    total = math.fsum(segment.weights.values())
    none_negative = all(weight >= 0 for weight in segment.weights.values())
    if not none_negative or abs(total - 1) > WEIGHT_SUM_TOLERANCE:
        raise ConfigError(
            f"mix ledger: weights from step {segment.start_step} are not shares that sum to 1."
        )


def resume_ledger(
    stored: Mapping[str, Any],
    mix: MixConfig,
    next_step: int,
    *,
    accept_change: bool,
    rows: Mapping[str, str] | None = None,
) -> Ledger:
    """Return the ledger to go on with: the stored one, or one segment longer after an edit.

    Args:
        stored: `Ledger.to_json` of the run so far.
        mix: The mix as it is now.
        next_step: The first step that is still to be done; an accepted edit starts there.
        accept_change: Whether the user agrees to go on with an edited mix.
        rows: `BuildManifest.row_hashes` of the present build; None leaves out the check that no
            rows changed.

    Raises:
        ConfigError: the mix was edited and the edit was not accepted (the message shows it line by
            line), or it would lose or repeat rows, which no flag allows.
    """
    ledger = Ledger.from_json(stored)
    last = ledger.segments[-1]
    if last.start_step > next_step:
        raise ConfigError(
            f"mix ledger: its last segment starts at step {last.start_step}, after step "
            f"{next_step}."
        )
    _check_drawn_sources(ledger, mix, rows)
    same_rows = rows is None or rows.items() <= dict(last.rows).items()
    if mix_hash(mix) == last.mix_hash and same_rows:
        return ledger
    if not accept_change:
        changes = describe_changes(last.settings, mix_settings(mix))
        for name in _sources_with_other_rows(last, rows):
            changes.append(f"rows of source {name}: others than before")
        raise ConfigError(
            [
                f"The data mix was edited since step {last.start_step} of this run:",
                *(f"  {line}" for line in changes),
                f"Change it back, or go on with the edited mix from step {next_step} on: "
                "--set data.accept_mix_change=true",
            ]
        )
    if last.start_step < next_step:
        return ledger.append(mix, next_step, rows)
    # no row was drawn from the last segment: the new one takes its place
    if len(ledger.segments) == 1:
        return Ledger.start(mix, rows)
    return Ledger(ledger.segments[:-1]).append(mix, next_step, rows)


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


def _check_drawn_sources(ledger: Ledger, mix: MixConfig, rows: Mapping[str, str] | None) -> None:
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
    for name in sorted(_drawn_sources(ledger)):
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


def _drawn_sources(ledger: Ledger) -> set[str]:
    """Return the sources that have a weight in any segment."""
    drawn = set()
    for segment in ledger.segments:
        for name, weight in segment.weights.items():
            if weight > 0:
                drawn.add(name)
    return drawn


def _known_rows(ledger: Ledger, source_name: str) -> str | None:
    """Return the hash of a source's rows that the latest segment to know it has."""
    for segment in reversed(ledger.segments):
        if source_name in segment.rows:
            return segment.rows[source_name]
    return None


def _segment(mix: MixConfig, start_step: int, rows: Mapping[str, str] | None) -> Segment:
    weights = {}
    max_epochs = {}
    for source in mix.sources:
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

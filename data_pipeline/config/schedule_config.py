"""The `schedule` section of a data mix: the phases of a run, and the rules that span them.

Decisions
    The weights of a phase are all of its shares: a source that they do not name has none. Since
    they must sum to 1, a source left out by mistake is found by the sum. A phase without `weights`
    has those of the sources, all of them; nothing is inherited in part.
    A linear change is `weights` at its beginning and `to` at its end. Every share moves on a
    straight line, and so does the share of a language: bounds that hold at both ends hold between.
    Like `mix_checks`, the rules that span phases read the parsed file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from data_pipeline.config.language_limits import WEIGHT_SUM_TOLERANCE, LanguageLimits
from data_pipeline.config.source_config import LANGUAGES, check_name
from data_pipeline.config.strict_yaml import KeyPath, Reader, is_number, nearest

REST = "rest"
"""The `share` of a last phase that goes on to the end of the run."""

MAX_LR_FACTOR = 100
"""Largest factor of a phase on the learning rate."""
RawSection = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class SchedulePhase:
    """A part of the run with a mixture of its own."""

    name: str
    """Unique name of the phase in plans, reports and `train.decay_phase`."""
    share: float | Literal["rest"] | None = None
    """Length of the phase as a share of the run's steps, 0 to 1; the last one may be rest. Give
    either this or `until_step`."""
    until_step: int | None = None
    """Step of the run, counted from 1, that is the last of the phase; the phases after it divide
    what is left."""
    weights: dict[str, float] = field(default_factory=dict)
    """Share of the predicted tokens by source name; they sum to 1, and a source that is not named
    has none. Without them the phase has the weights of the sources."""
    to: dict[str, float] = field(default_factory=dict)
    """Weights at the end of the phase, to which `weights` change in proportion to the tokens;
    without them the weights stay."""
    languages: dict[str, LanguageLimits] = field(default_factory=dict)
    """Bounds on languages during the phase, in place of those of the mix for the same language."""
    max_epochs: dict[str, float] = field(default_factory=dict)
    """Largest number of epochs within the phase, by source name; `max_epochs` of a source counts
    from the beginning of the run."""
    lr_factor: float = 1.0
    """Factor on the learning rate during the phase, 0 to 100; the course of `train.schedule` stays
    what it is."""
    to_lr_factor: float | None = None
    """Factor at the last step of the phase, to which `lr_factor` changes on a straight line over
    its steps; without it the factor stays."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield (key, problem) for each broken rule within one phase."""
        yield from check_name(self.name)
        if (self.share is None) == (self.until_step is None):
            yield (
                "share",
                "and until_step: give exactly one of them, the length of the phase or its end.",
            )
        if isinstance(self.share, float) and not 0 < self.share <= 1:
            yield "share", f"is {self.share:g}, must be above 0 and at most 1, or rest."
        if self.until_step is not None and self.until_step < 1:
            yield "until_step", f"is {self.until_step}, must be 1 or more."
        for name, limit in self.max_epochs.items():
            if limit <= 0:
                yield (
                    f"max_epochs.{name}",
                    f"is {limit:g}, must be above 0. Remove it to repeat without limit, or leave "
                    "the source out of the weights.",
                )
        factors = {"lr_factor": self.lr_factor, "to_lr_factor": self.last_lr_factor}
        for key, factor in factors.items():
            if not 0 <= factor <= MAX_LR_FACTOR:
                yield key, f"is {factor:g}, must be from 0 to {MAX_LR_FACTOR}."
        if not any(factors.values()):
            yield (
                "lr_factor",
                "is 0 throughout the phase: nothing would be learned in it. Raise it, or remove "
                "the phase.",
            )

    @property
    def last_lr_factor(self) -> float:
        """The factor on the learning rate at the last step of the phase."""
        return self.lr_factor if self.to_lr_factor is None else self.to_lr_factor


def check_schedule(reader: Reader, raw: RawSection, sources: Mapping[str, RawSection]) -> None:
    """Report every broken rule that spans the phases of a schedule, or a phase and the sources.

    Args:
        reader: Takes the problems.
        raw: The parsed mix.
        sources: Its sources by name.
    """
    listed = raw.get("schedule")
    if listed == []:
        reader.problem(("schedule",), "is an empty list. Add a phase, or remove it.")
    if not isinstance(listed, list) or not listed:
        return
    phases: dict[int, RawSection] = {}
    for index, phase in enumerate(listed):
        if isinstance(phase, dict):
            phases[index] = phase
    _check_names(reader, phases)
    if len(phases) == len(listed):
        _check_lengths(reader, phases)
    for index, phase in phases.items():
        for key in ("weights", "to"):
            if isinstance(phase.get(key), dict):
                _check_weights(reader, phase[key], ("schedule", index, key), sources)
        for name in _section(phase.get("max_epochs")):
            _check_source(reader, name, ("schedule", index, "max_epochs", name), sources)
        _check_languages(reader, raw, phase, ("schedule", index), sources)


def _check_names(reader: Reader, phases: Mapping[int, RawSection]) -> None:
    seen: set[str] = set()
    for index, phase in phases.items():
        name = phase.get("name")
        if not isinstance(name, str):
            continue
        if name in seen:
            reader.problem(
                ("schedule", index, "name"),
                f"is '{name}', which an earlier phase has, too. Give each its own name.",
            )
        seen.add(name)


def _check_lengths(reader: Reader, phases: Mapping[int, RawSection]) -> None:
    """Check that the phases follow each other and cover the run."""
    last = len(phases) - 1
    ends: list[int] = []
    shares: list[float] = []
    for index, phase in phases.items():
        share = phase.get("share")
        end = phase.get("until_step")
        if share == REST and index < last:
            reader.problem(
                ("schedule", index, "share"),
                "is rest, but phases follow. Only the last one may take what is left.",
            )
        if is_number(share):
            shares.append(share)
        if type(end) is int:
            if ends and end <= ends[-1]:
                reader.problem(
                    ("schedule", index, "until_step"),
                    f"is {end}, but an earlier phase ends at step {ends[-1]}. Let the phases "
                    "follow each other.",
                )
            ends.append(end)
    total = math.fsum(shares)
    takes_rest = phases[last].get("share") == REST
    if takes_rest and total >= 1:
        reader.problem(
            ("schedule",), f"has shares that sum to {total:g}, which leaves nothing for the rest."
        )
    elif ends and not takes_rest:
        reader.problem(
            ("schedule", last),
            "must have share: rest, because an earlier or this phase has an until_step: only so "
            "the phases cover runs of any length.",
        )
    elif not ends and not takes_rest and len(shares) == len(phases) and _is_off(total):
        reader.problem(
            ("schedule",),
            f"has shares that sum to {total:.9g}, must be 1. Change them, or give the last phase "
            "share: rest.",
        )


def _check_source(
    reader: Reader, name: Any, path: KeyPath, sources: Mapping[str, RawSection]
) -> None:
    if name not in sources:
        reader.problem(path, f"is no source of the mix.{nearest(str(name), sources)}")


def _check_weights(
    reader: Reader, weights: RawSection, path: KeyPath, sources: Mapping[str, RawSection]
) -> None:
    """Check that weights name sources with text to train on, and are shares that sum to 1."""
    for name, weight in weights.items():
        _check_source(reader, name, (*path, name), sources)
        if not is_number(weight):
            return
        if not 0 <= weight < math.inf:
            reader.problem((*path, name), f"is {weight:g}, must be a share from 0 to 1.")
            return
        if weight > 0 and sources.get(name, {}).get("held_out_share") == 1:
            reader.problem(
                (*path, name),
                f"is {weight:g}, but all documents of this source are held out. Remove it, or hold "
                "out less.",
            )
    total = math.fsum(weights.values())
    if _is_off(total):
        scaled = []
        for name, weight in weights.items():
            if total > 0:
                scaled.append(f"{name} {weight / total:.6g}")
        cure = f"Scaled to 1: {', '.join(scaled)}." if scaled else "Give a source a share."
        reader.problem(path, f"has weights that sum to {total:.9g}, must be 1. {cure}")


def _check_languages(
    reader: Reader,
    raw: RawSection,
    phase: RawSection,
    path: KeyPath,
    sources: Mapping[str, RawSection],
) -> None:
    """Check that a phase keeps the bounds on languages at its beginning and its end."""
    bounds = dict(_section(raw.get("languages")))
    for language, limits in _section(phase.get("languages")).items():
        if language not in LANGUAGES:
            reader.problem(
                (*path, "languages", language),
                f"is not a known language.{nearest(str(language), LANGUAGES)}",
            )
        bounds[language] = limits
    for key in ("weights", "to"):
        weights = phase.get(key)
        if key == "weights" and not weights and phase.get("languages"):
            weights = {name: source.get("weight") for name, source in sources.items()}
        if not weights or not isinstance(weights, dict):
            continue
        if not all(map(is_number, weights.values())):
            continue
        for language, limits in bounds.items():
            _check_share(reader, language, limits, weights, (*path, key), sources)


def _check_share(
    reader: Reader,
    language: str,
    limits: Any,
    weights: Mapping[str, float],
    path: KeyPath,
    sources: Mapping[str, RawSection],
) -> None:
    parts = []
    for name, weight in weights.items():
        if sources.get(name, {}).get("language") == language:
            parts.append(weight)
    share = math.fsum(parts)
    low = _section(limits).get("min_share", 0.0)
    high = _section(limits).get("max_share", 1.0)
    if is_number(low) and share < low - WEIGHT_SUM_TOLERANCE:
        reader.problem(
            path,
            f"gives {language} {share:g}, but its min_share is {low:g}. Raise its weights, or give "
            "the phase a floor of its own under languages.",
        )
    if is_number(high) and share > high + WEIGHT_SUM_TOLERANCE:
        reader.problem(
            path,
            f"gives {language} {share:g}, but its max_share is {high:g}. Lower its weights, or "
            "give the phase a ceiling of its own under languages.",
        )


def _section(value: Any) -> RawSection:
    return value if isinstance(value, dict) else {}


def _is_off(total: float) -> bool:
    return abs(total - 1) > WEIGHT_SUM_TOLERANCE

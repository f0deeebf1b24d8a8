"""The phases of a schedule over the steps of one run: where each begins and ends.

Decisions
    Shares are parts of the run's steps. All steps have the same rows, so they are parts of its
    rows, too, and of its tokens as far as rows are equally full.
    Borders are rounded once, from the exact end of a phase, so rounding never adds up.
    A run of other length has other borders. That is an edit of the mix like any other: it is shown
    and has to be accepted (`ledger.resume_ledger`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.schedule_config import REST, SchedulePhase
from data_pipeline.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Phase:
    """A phase of a schedule with its place in a run."""

    name: str
    start_step: int
    """First step, counted from 0."""
    stop_step: int
    """Step after the last one."""
    weights: Mapping[str, float]
    """Share of the predicted tokens of every source, at the beginning."""
    to_weights: Mapping[str, float] | None
    """Shares at the end, for a linear change; None if they stay."""

    def weights_at(self, step: int) -> dict[str, float]:
        """Return the shares that are planned at a step."""
        if self.to_weights is None:
            return dict(self.weights)
        part = (step - self.start_step) / (self.stop_step - self.start_step)
        return between(self.weights, self.to_weights, part)


@dataclass(frozen=True, kw_only=True, slots=True)
class RateFactor:
    """What a phase makes of the learning rate."""

    phase: str
    """Name of the phase."""
    start_step: int
    """First step, counted from 0."""
    stop_step: int
    """Step after the last one."""
    first: float
    """Factor where a straight line begins, one step before the first one; or that of all steps."""
    last: float
    """Factor at the last step; `first` unless it changes."""

    def at(self, step: int) -> float:
        """Return the factor of a step of the phase.

        As in the decay of `train.schedule: wsd`, the last step is the first to have the end.
        """
        part = (step + 1 - self.start_step) / (self.stop_step - self.start_step)
        part = min(max(part, 0.0), 1.0)
        return (1 - part) * self.first + part * self.last


def rate_factors(mix: MixConfig, total_steps: int) -> tuple[RateFactor, ...]:
    """Return the factors on the learning rate of all phases of a run; none if all are 1.

    Raises:
        ConfigError: the run cannot follow the schedule.
    """
    if all(phase.lr_factor == phase.last_lr_factor == 1 for phase in mix.schedule):
        return ()
    factors = []
    for phase, span in zip(mix.schedule, phases_of(mix, total_steps), strict=True):
        factors.append(
            RateFactor(
                phase=phase.name,
                start_step=span.start_step,
                stop_step=span.stop_step,
                first=phase.lr_factor,
                last=phase.last_lr_factor,
            )
        )
    return tuple(factors)


def rate_factor_at(step: int, factors: Sequence[RateFactor]) -> float:
    """Return the factor on the learning rate at a step of the run, counted from 0.

    Behind the last phase, where no step of the run is, its last factor stays.
    """
    for factor in factors:
        if step < factor.stop_step:
            return factor.at(step)
    return factors[-1].last if factors else 1.0


def between(first: Mapping[str, float], last: Mapping[str, float], part: float) -> dict[str, float]:
    """Return shares on the straight line from `first` (`part` is 0) to `last` (`part` is 1)."""
    part = min(max(part, 0.0), 1.0)
    return {name: (1 - part) * share + part * last[name] for name, share in first.items()}


def phases_of(mix: MixConfig, total_steps: int) -> tuple[Phase, ...]:
    """Return the phases of a run of `total_steps` steps; none without a schedule.

    Raises:
        ConfigError: a phase ends after the run, or has no step; all of them.
    """
    problems = phase_problems(mix, total_steps)
    if problems:
        raise ConfigError(problems)
    phases = []
    start = 0
    for phase, end in zip(mix.schedule, _ends(mix, total_steps), strict=True):
        to_weights = _all_weights(mix, phase.to) if phase.to else None
        phases.append(
            Phase(
                name=phase.name,
                start_step=start,
                stop_step=end,
                weights=_all_weights(mix, phase.weights),
                to_weights=to_weights,
            )
        )
        start = end
    return tuple(phases)


def phase_problems(mix: MixConfig, total_steps: int) -> list[str]:
    """Return why a run of `total_steps` steps cannot follow the schedule of a mix."""
    problems = []
    start = 0
    for phase, end in zip(mix.schedule, _ends(mix, total_steps), strict=True):
        if end > total_steps:
            problems.append(
                f"schedule: phase '{phase.name}' ends at step {end}, but the run has {total_steps} "
                "steps. Lower its until_step or share, or train longer."
            )
        elif end <= start:
            problems.append(
                f"schedule: phase '{phase.name}' has no step in a run of {total_steps} steps "
                f"({_length(phase)} from step {start} on). Make it longer, remove it, or train "
                "longer."
            )
        start = max(start, end)
    return problems


def _ends(mix: MixConfig, total_steps: int) -> list[int]:
    """Return the step after the last one of each phase, rounded half up."""
    ends = []
    exact = 0.0
    last = len(mix.schedule) - 1
    for index, phase in enumerate(mix.schedule):
        if phase.until_step is not None:
            exact = float(phase.until_step)
        elif isinstance(phase.share, float):
            exact += phase.share * total_steps
        is_rest = phase.share == REST
        covers_run = index == last and not any(one.until_step for one in mix.schedule)
        if is_rest or covers_run:  # shares sum to 1 up to rounding
            exact = float(total_steps)
        ends.append(math.floor(exact + 0.5))
    return ends


def _length(phase: SchedulePhase) -> str:
    if phase.until_step is not None:
        return f"until_step: {phase.until_step}"
    return f"share: {phase.share if phase.share == REST else format(phase.share, 'g')}"


def _all_weights(mix: MixConfig, weights: Mapping[str, float]) -> dict[str, float]:
    """Return the share of every source; those of the mix if none are given."""
    if not weights:
        return {source.name: source.weight for source in mix.sources}
    return {source.name: weights.get(source.name, 0.0) for source in mix.sources}

"""Compare the configuration of a checkpoint with that of the run that goes on from it.

Decisions
    Every difference is told.  Most are harmless or wanted: another layout, another interval.
    A changed schedule has to be accepted, because the checkpoint was made on the way down another
    curve.  What counts is the curve and not the keys: two schedules are the same if they have the
    same learning rate in every step to come that both have.  So more steps of a constant rate, or a
    longer warm-up that is over, need no word. The factors of the mix's phases belong to the curve.
    A checkpoint without a readable configuration is taken as it is, and that is told.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cpt.checkpoint.run_state import RunState
from cpt.config import RunConfig, TrainSection
from cpt.errors import ConfigError
from cpt.training.schedule import learning_rate
from data_pipeline.mixture.phases import RateFactor

ACCEPT_KEY = "train.accept_schedule_change"
SCHEDULE_KEYS = ("lr", "min_lr_ratio", "schedule", "warmup_steps", "decay_steps", "total_steps")
"""Keys of the `train` section that `learning_rate` reads."""
_RELATIVE_TOLERANCE = 1e-9
_NUM_COMPARED_STEPS = 256
"""How many steps are compared besides those at which a schedule bends."""
_MOST_LINES = 40
"""How many differences are told one by one."""
_LONGEST_VALUE = 80
_ABSENT = object()


@dataclass(frozen=True, kw_only=True, slots=True)
class Seam:
    """What changes between the last step of a checkpoint and the next one."""

    checkpoint: str
    """Name of the checkpoint."""
    step: int
    """Optimizer steps done."""
    differences: tuple[str, ...]
    """One line for each key whose value differs."""
    before: TrainSection | None
    """The schedule of the checkpoint; None if it cannot be read."""
    now: TrainSection
    """The schedule of the run."""
    factors_before: tuple[RateFactor, ...] = ()
    """What the phases of the mix made of it; the phases behind a checkpoint are its past."""
    factors_now: tuple[RateFactor, ...] = ()
    """What they make of it in the run."""

    @classmethod
    def of(cls, state: RunState, checkpoint: str, step: int, config: RunConfig) -> Seam:
        """Compare a checkpoint with a run.

        Args:
            state: The checkpoint's.
            checkpoint: Its name.
            step: Optimizer steps that it has done.
            config: The run as it is configured now.
        """
        before = state.config if isinstance(state.config, Mapping) else None
        lines: list[str] = []
        if before is not None:
            lines = _differences(before, config.to_plain())
        factors = _factors_of(before)
        return cls(
            checkpoint=checkpoint,
            step=step,
            differences=tuple(lines),
            before=None if factors is None else _schedule_of(before, config.train),
            now=config.train,
            factors_before=factors or (),
            factors_now=config.lr_factors,
        )

    @property
    def last_step(self) -> int:
        """The step after which the run ends."""
        train = self.now
        return train.total_steps if train.stop_at_step is None else train.stop_at_step

    @property
    def is_done(self) -> bool:
        """Whether the checkpoint has all steps that are asked for."""
        return self.step >= self.last_step > 0

    def changes_schedule(self) -> bool:
        """Return whether a step to come has another learning rate than it was planned with."""
        before = self.before
        if before is None or self.is_done:
            return False
        bends = {span.start_step for span in (*self.factors_before, *self.factors_now)}
        for step in _compared_steps(self.step, before, self.now, bends):
            planned = learning_rate(step, before, self.factors_before)
            rate = learning_rate(step, self.now, self.factors_now)
            if not math.isclose(planned, rate, rel_tol=_RELATIVE_TOLERANCE):
                return True
        return False

    def check(self) -> None:
        """Refuse to follow another schedule, unless that is accepted.

        Raises:
            ConfigError: the schedule was changed since the checkpoint.
        """
        if self.now.accept_schedule_change or not self.changes_schedule():
            return
        before = self.before
        changed = []
        for name in SCHEDULE_KEYS:
            old_value, new_value = getattr(before, name), getattr(self.now, name)
            if old_value != new_value:
                changed.append(f"train.{name} {old_value} -> {new_value}")
        changed += _changed_factors(self.factors_before, self.factors_now)
        raise ConfigError(
            f"{self.checkpoint} was trained with another schedule ({', '.join(changed)}): "
            f"{self._rates()}. Change it back, or accept it with --set {ACCEPT_KEY}=true."
        )

    def describe(self) -> str:
        """Return what differs, and the learning rate on both sides, for people."""
        if self.is_done:
            key = "total_steps" if self.now.stop_at_step is None else "stop_at_step"
            return (
                f"{self.checkpoint} has done {self.step} steps, but train.{key} is "
                f"{self.last_step}: nothing is left to do. Raise train.{key} to go on."
            )
        lines = [f"going on from {self.checkpoint}"]
        if self.before is None:
            lines.append("  it does not tell its configuration, so nothing can be compared")
        elif not self.differences:
            lines.append("  with the configuration that it was trained with")
        for line in self.differences[:_MOST_LINES]:
            lines.append(f"  {line}")
        if len(self.differences) > _MOST_LINES:
            lines.append(f"  and {len(self.differences) - _MOST_LINES} more")
        lines.append(f"  {self._rates()}")
        return "\n".join(lines)

    def _rates(self) -> str:
        rate = learning_rate(self.step, self.now, self.factors_now)
        following = f"step {self.step + 1} has {rate:.4g}"
        if self.before is None:
            return f"learning rate: {following}"
        if self.step > 0:
            last = learning_rate(self.step - 1, self.before, self.factors_before)
            following = f"step {self.step} had {last:.4g}, {following}"
        planned = learning_rate(self.step, self.before, self.factors_before)
        return f"learning rate: {following} (planned before: {planned:.4g})"


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Return a line for each key of nested mappings whose values differ, those of `train` first."""
    old, new = _flat(before), _flat(now)
    lines = []
    for key in sorted(old.keys() | new.keys(), key=lambda key: (not key.startswith("train."), key)):
        old_value, new_value = old.get(key, _ABSENT), new.get(key, _ABSENT)
        if old_value != new_value and key != ACCEPT_KEY:
            lines.append(f"{key}: {_shown(old_value)} -> {_shown(new_value)}")
    return lines


def _flat(plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return the leaves of nested mappings by dotted key; an empty mapping is a leaf."""
    leaves: dict[str, Any] = {}
    waiting: list[tuple[str, Any]] = [("", plain)]
    while waiting:
        prefix, value = waiting.pop()
        if not isinstance(value, Mapping) or (prefix and not value):
            leaves[prefix] = value
            continue
        for key, item in value.items():
            waiting.append((f"{prefix}.{key}" if prefix else str(key), item))
    leaves.pop("", None)
    return leaves


def _shown(value: Any) -> str:
    if value is _ABSENT:
        return "not there"
    text = repr(value)
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."


def _schedule_of(before: Mapping[str, Any] | None, now: TrainSection) -> TrainSection | None:
    """Return the schedule of an earlier configuration; None if it is not all there."""
    train = None if before is None else before.get("train")
    if not isinstance(train, Mapping):
        return None
    values: dict[str, Any] = {}
    for name in SCHEDULE_KEYS:
        value = train.get(name)
        if not _is_like(value, getattr(now, name)):
            return None
        values[name] = value
    if values["schedule"] not in ("cosine", "constant", "wsd"):
        return None
    return replace(now, **values)


def _factors_of(before: Mapping[str, Any] | None) -> tuple[RateFactor, ...] | None:
    """Return the factors of an earlier configuration; None if they cannot be read."""
    listed = [] if before is None else before.get("lr_factors", [])
    if not isinstance(listed, (list, tuple)):
        return None
    examples: dict[str, Any] = {
        "phase": "",
        "start_step": 0,
        "stop_step": 0,
        "first": 1.0,
        "last": 1.0,
    }
    factors = []
    for item in listed:
        if not isinstance(item, Mapping) or item.keys() != examples.keys():
            return None
        if not all(_is_like(item[key], example) for key, example in examples.items()):
            return None
        if item["stop_step"] <= item["start_step"]:
            return None
        factors.append(RateFactor(**item))
    return tuple(factors)


def _changed_factors(before: Sequence[RateFactor], now: Sequence[RateFactor]) -> list[str]:
    """Return what differs between the factors of phases, for people."""
    old = {factor.phase: factor for factor in before}
    new = {factor.phase: factor for factor in now}
    lines = []
    for phase in dict.fromkeys([*old, *new]):
        if old.get(phase) != new.get(phase):
            lines.append(
                f"factor of phase {phase} {_factor_text(old.get(phase))} -> "
                f"{_factor_text(new.get(phase))}"
            )
    return lines


def _factor_text(factor: RateFactor | None) -> str:
    if factor is None:
        return "1"
    text = f"{factor.first:g}"
    if factor.last != factor.first:
        text += f" to {factor.last:g}"
    return f"{text} (steps {factor.start_step + 1} to {factor.stop_step})"


def _is_like(value: Any, example: Any) -> bool:
    """Return whether a value of a manifest has the type of a value of today and can be used."""
    if isinstance(example, str):
        return isinstance(value, str)
    if isinstance(example, int):
        return type(value) is int and 0 <= value < 2**63
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and 0 <= value < 2**63


def _compared_steps(
    first: int, before: TrainSection, now: TrainSection, bends: Iterable[int]
) -> list[int]:
    """Return steps at which two schedules are compared: at least the next one.

    Args:
        first: The next step.
        before: The schedule of the checkpoint.
        now: That of the run.
        bends: Steps at which phases of the mix begin.
    """
    last = max(first, min(before.total_steps, now.total_steps) - 1)
    steps = {first, last}
    all_bends = set(bends)
    for train in (before, now):
        all_bends |= {train.warmup_steps, train.total_steps - train.decay_steps}
    for bend in all_bends:
        steps |= {bend - 1, bend, bend + 1}
    for number in range(_NUM_COMPARED_STEPS):
        steps.add(first + (last - first) * number // _NUM_COMPARED_STEPS)
    return sorted(step for step in steps if first <= step <= last)

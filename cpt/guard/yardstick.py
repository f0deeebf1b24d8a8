"""The seam between the guard and its ways of measuring.

    Yardstick.measure   all ranks, the present weights  -> raw scores (JSON, kept on disk)
    Judge.judge         raw scores + sequential state   -> readings, events, the next state
    Evidence            a reading + the shares of replay -> the decision (cpt/guard/ladder.py)

A yardstick is one way of measuring: bits per byte of held-out text, replies that the model writes,
or the divergence on its own traces. Measuring needs the model and all ranks. Judging is pure, so
that `cpt guard audit` repeats it from the stored scores. The guard (cpt/guard/guard.py) holds a
list of yardsticks, gives the readings of all of them to one decision, and keeps their sequential
states in `GuardState`, so in every checkpoint.

Reading states:

    green   It is proven that the loss is below the tolerance.
    red     A loss is proven.
    amber   Neither is.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol, Self

from cpt.config import GuardSection
from cpt.resilience.stop import StopRequest
from cpt.training.engine import TrainingEngine

Json = dict[str, Any]
Kind = Literal["text", "generation", "traces"]
State = Literal["green", "amber", "red"]

UNITS: dict[Kind, str] = {"text": "%", "generation": "points", "traces": "nats a token"}
"""Unit of the losses and tolerances of each kind, for people."""
FALSE_ALARM_SHARE = 0.01
"""Largest share of the runs that lose nothing and yet see a domain go red."""
GREEN_ERROR = 0.05
"""Probability that the upper bound of one look, from which green follows, is too low."""
LAST_GREEN_ERROR = 0.01
"""The same at the end of the run, when a model may be released."""
BADNESS: dict[State, int] = {"green": 0, "amber": 1, "red": 2}
"""Order of the states, the best first."""
OLD_NAMES = {"tolerance_percent": "tolerance", "hard_limit_percent": "hard_limit"}
"""Fields of a reading as logs of runs before 0.2 name them."""


class Plain:
    """A frozen dataclass of plain values, which goes to JSON and back."""

    __slots__ = ()

    @classmethod
    def from_json(cls, plain: Mapping[str, Any] | None) -> Self:
        """Read the output of `to_json`; None gives the defaults."""
        return cls(**(plain or {}))

    def to_json(self) -> Json:
        """Return the fields as JSON values."""
        plain: Json = {}
        for one in dataclasses.fields(self):  # type: ignore[arg-type]
            value = getattr(self, one.name)
            plain[one.name] = dict(value) if isinstance(value, Mapping) else value
        return plain


@dataclass(frozen=True, kw_only=True, slots=True)
class Look:
    """One look of the guard at the model: everything but the scores that readings depend on."""

    step: int
    """Optimizer steps done."""
    number: int
    """Number of the look, counted from 0, which is the untouched model. What is drawn for a look
    depends on this number and the seed alone.
    """
    num_looks: int
    """Looks of the whole run."""
    num_domains: int
    """Domains of all yardsticks of the run."""
    last: bool
    """Whether this is the look at the end of the run."""
    settings: GuardSection
    """The run's guard section."""

    @property
    def num_tests(self) -> int:
        """Domains times looks: how many bounds of the run must hold together."""
        return self.num_domains * self.num_looks

    @property
    def alarm_threshold(self) -> float:
        """Value of a Shiryaev-Roberts statistic of one domain from which on it alarms.

        Its expectation after t looks without a loss is at most t. By Markov's inequality at the
        first alarm, at most `FALSE_ALARM_SHARE` of all runs without a loss see one in any domain.
        """
        return self.num_tests / FALSE_ALARM_SHARE

    @property
    def green_error(self) -> float:
        """Probability that an upper bound of this look is too low."""
        return LAST_GREEN_ERROR if self.last else GREEN_ERROR


def state_of(
    lower_bound: float | None, upper_bound: float | None, *, line: float, tolerance: float
) -> State:
    """Return the state of a domain.

    Args:
        lower_bound: The loss that is certain; None if a score is not a number.
        upper_bound: The loss is certainly below it; None if there is no such bound.
        line: Loss from which on a certain one counts.
        tolerance: Tolerated loss.
    """
    if lower_bound is None or lower_bound >= line:
        return "red"
    if upper_bound is not None and upper_bound < tolerance:
        return "green"
    return "amber"


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading(Plain):
    """The reading of one domain at one look. Losses have the unit of the tolerance."""

    domain: str
    """Name of the domain, different from those of all other yardsticks."""
    kind: Kind = "text"
    """Kind of the yardstick."""
    step: int = 0
    """Optimizer steps done when it was measured."""
    state: State = "amber"
    """See the module."""
    delta: float | None = None
    """Estimate of the loss; positive is worse. None if it is not a number."""
    lower_bound: float | None
    """The loss that is certain at this look and all others together; None if a score is not a
    number, which counts as above every limit.
    """
    upper_bound: float | None = None
    """One-sided bound: the loss is certainly below it, at this look. None if there is none."""
    tolerance: float
    """Tolerated loss."""
    hard_limit: float
    """Loss that ends in a pause if it stays."""

    @classmethod
    def from_json(cls, plain: Mapping[str, Any] | None) -> Self:
        """Read the output of `to_json`, also as older runs wrote it."""
        values = {}
        for name, value in (plain or {}).items():
            values[OLD_NAMES.get(name, name)] = value
        return cls(**values)

    def above(self, limit: float) -> bool:
        """Return whether the loss certainly reaches a limit; NaN is above every limit."""
        return self.lower_bound is None or self.lower_bound >= limit


@dataclass(frozen=True, kw_only=True, slots=True)
class Evidence(Reading):
    """Everything about one domain that a decision depends on."""

    age_steps: int = 0
    """Optimizer steps since the domain was measured; 0 at the look that measured it."""
    share: float | None = None
    """Present share of its sources in the predicted tokens, 0 to 1; None if replay cannot help."""
    largest_share: float = 1.0
    """Largest value of that share, by the limits of its language and the epochs of its sources."""

    @classmethod
    def of(
        cls, reading: Reading, step: int, share: float | None = None, largest_share: float = 1.0
    ) -> Self:
        """Return a reading as evidence for a decision at a step."""
        return cls(
            **reading.to_json(),
            age_steps=step - reading.step,
            share=share,
            largest_share=largest_share,
        )

    def reading(self) -> Reading:
        """Return the part that was measured."""
        values = {one.name: getattr(self, one.name) for one in dataclasses.fields(Reading)}
        return Reading(**values)


@dataclass(frozen=True, kw_only=True, slots=True)
class Judgement:
    """The outcome of judging one yardstick's scores."""

    readings: Sequence[Reading]
    """One per measured domain."""
    state: Json
    """The next sequential state of the yardstick, as JSON values."""
    events: Sequence[Json]
    """Fields of the `guard` lines of metrics.jsonl beyond those of the readings, each with
    `domain`; a domain may have several lines.
    """


class Judge(Protocol):
    """The pure half of a yardstick: it knows the frozen baseline, but no model."""

    def judge(self, scores: Json, state: Json, look: Look) -> Judgement:
        """Judge the raw scores of one look.

        Args:
            scores: The output of `Yardstick.measure`, after JSON.
            state: Sequential state after the look before; empty at the start.
            look: The look.
        """
        ...

    def restarted(self, state: Json, domains: Collection[str]) -> Json:
        """Return the sequential state after a lever was pulled for some domains.

        What they lost before the lever must not count against what they lose after it.
        """
        ...

    def returned(self, saved: Json, lost: Json) -> Json:
        """Return the sequential state with which a run goes on from an earlier checkpoint.

        Args:
            saved: The state in that checkpoint.
            lost: The state that the run has left.
        """
        ...


class Yardstick(Judge, Protocol):
    """One way of measuring, over one or more domains. All ranks call its methods together."""

    @property
    def kind(self) -> Kind:
        """Kind of the yardstick."""
        ...

    @property
    def domain_names(self) -> Sequence[str]:
        """Names of its domains."""
        ...

    def is_due(self, look: Look) -> bool:
        """Return whether it measures at a look; it does at step 0 and at the end of the run."""
        ...

    def open_untouched(self, step: int) -> None:
        """Read what was kept of the untouched model, unless it is known; `measure` does so, too.

        Args:
            step: Optimizer steps done. At 0 nothing needs to be there.

        Raises:
            ConfigError: there is no baseline, or it is of another model or other content.
        """
        ...

    def keep_untouched(self, look: Look, engine: TrainingEngine, stop: StopRequest | None) -> bool:
        """Measure the untouched model, whose weights the engine has, and keep what is measured.

        What an earlier start kept is read instead. A run with `guard.baseline_model` calls it
        before it reads the weights that it starts from; otherwise `measure` does so at step 0.

        Args:
            look: The look of step 0.
            engine: The untouched model.
            stop: Looked at on the way.

        Returns:
            False if a stop was requested before everything was measured.

        Raises:
            ConfigError: what was kept is of another model or other content.
        """
        ...

    def measure(self, look: Look, engine: TrainingEngine, stop: StopRequest | None) -> Json | None:
        """Measure the present weights.

        At step 0 it freezes the baseline of the untouched model first, in a file of its own in
        `<run_dir>/guard`, with hashes of the content and of the weights. Later it reads that file.

        Args:
            look: The look.
            engine: The model.
            stop: Looked at on the way, because a measurement is not worth a missed deadline.

        Returns:
            Raw scores as JSON values, enough for `judge`; None if a stop was requested.

        Raises:
            ConfigError: there is no baseline, or it is of another model or other content.
        """
        ...

    def table(self, events: Sequence[Json]) -> str:
        """Return the events of one look as a table for people.

        Args:
            events: The `guard` lines of its domains.
        """
        ...

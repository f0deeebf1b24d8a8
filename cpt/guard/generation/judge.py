"""From the measures of replies to readings and events; pure, so that an audit repeats it.

    columns of measures, before and now -> Outcomes -> bounds, betting process -> reading, events

Each domain has a reading of the worse of its two quantities: format, and accuracy if its prompts
have answers. The measures that make up the format have lines of their own in metrics.jsonl, which
say what was lost; they decide nothing by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from cpt.guard.generation.measures import FORM_MEASURES, ReplyMeasures
from cpt.guard.generation.outcomes import (
    Measure,
    Outcomes,
    bet,
)
from cpt.guard.generation.untouched import FOLDER, Untouched, measures_of, read_untouched
from cpt.guard.yardstick import (
    BADNESS,
    FALSE_ALARM_SHARE,
    Json,
    Judgement,
    Look,
    Reading,
    State,
    state_of,
)
from data_pipeline.bounded.json_text import LARGE_BYTES, read_json

QUANTILES = (0.1, 0.5, 0.9)
"""Quantiles of the length of thinking that are logged."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantityReading:
    """The reading of one quantity of one domain."""

    measure: Measure
    """Name of the quantity."""
    outcomes: Outcomes
    """Its outcomes at this look."""
    tolerance: float
    """Tolerated loss in points."""
    delta: float
    """Estimate of the loss in points."""
    lower_bound: float
    """Loss in points that is certain, at this look and all others."""
    upper_bound: float
    """The loss in points is certainly below it, at this look."""
    state: State
    """State of the quantity."""
    statistic: list[float]
    """Shiryaev-Roberts statistic after the look, by bet."""

    @property
    def badness(self) -> tuple[int, float]:
        """The order of verdicts, the best first."""
        return BADNESS[self.state], self.delta / self.tolerance


class GenerationJudge:
    """The pure half of the yardstick: the replies of the untouched model."""

    def __init__(
        self, untouched: Mapping[str, Untouched], replies_folder: Path | None = None
    ) -> None:
        """Take the replies of the untouched model.

        Args:
            untouched: They, by domain.
            replies_folder: Folder with the replies of looks, if measures are to be computed from
                them again; those of a look whose replies are gone are taken from its scores.
        """
        self.untouched = dict(untouched)
        self._replies_folder = replies_folder

    @classmethod
    def stored(cls, folder: Path) -> GenerationJudge:
        """Return a judge that computes every measure of a run again, from its replies.

        Args:
            folder: <run_dir>/guard.
        """
        untouched = {}
        for name, stored in read_untouched(folder).items():
            untouched[name] = stored.measured_again()
        return cls(untouched, folder / FOLDER)

    def judge(self, scores: Json, state: Json, look: Look) -> Judgement:
        """Compare measures with those of the untouched model; see `cpt.guard.yardstick.Judge`.

        Args:
            scores: Output of `Generation.measure`.
            state: By domain: the pass and the look that it is after, and the statistics of each
                quantity before and after that look.
            look: The look.
        """
        readings = []
        events = []
        after = dict(state)
        for name, measured in scores["domains"].items():
            before = [self.untouched[name].measures[index] for index in measured["prompts"]]
            now = self._measures_now(scores, name)
            known = _known_statistics(state.get(name, {}), scores["look"], measured["pass"])
            verdicts = _verdicts(before, now, measured, known, look)
            statistics = {verdict.measure: verdict.statistic for verdict in verdicts}
            if scores["look"] > 0:  # the untouched model has lost nothing
                after[name] = {
                    "look": scores["look"],
                    "pass": measured["pass"],
                    "before": known,
                    "after": statistics,
                }
            readings.append(_reading(name, verdicts, measured, look))
            events += _events(name, self.untouched[name].language, verdicts, before, now)
        for event in events:
            if "delta" in event:
                event["examples"] = scores["examples"]
        return Judgement(readings=readings, state=after, events=events)

    def _measures_now(self, scores: Json, name: str) -> list[ReplyMeasures]:
        """Return the measures of the replies of a look to the prompts of a domain."""
        measured = scores["domains"][name]
        if self._replies_folder is None or not scores["replies"]:
            return measures_of(measured["now"])
        path = self._replies_folder / Path(scores["replies"]).name
        if not path.is_file():
            return measures_of(measured["now"])
        replies = read_json(path, LARGE_BYTES, follow_links=False)["domains"][name]["replies"]
        return self.untouched[name].measure(measured["prompts"], replies)

    def restarted(self, state: Json, domains: Collection[str]) -> Json:
        """Return the state in which nothing counts against some domains."""
        after = dict(state)
        for name in domains:
            if name in after:
                after[name] = {**after[name], "before": {}, "after": {}}
        return after

    def returned(self, saved: Json, lost: Json) -> Json:
        """Return the saved state, in which nothing counts where prompts are asked again.

        Those of the looks after it helped to prove the loss from which the run went back, so they
        are no fresh ones.
        """
        asked_again = []
        for name, known in lost.items():
            if name in saved and known["look"] > saved[name]["look"]:
                asked_again.append(name)
        return self.restarted(saved, asked_again)


def _known_statistics(stored: Json, look: int, pass_number: int) -> dict[str, list[float]]:
    """Return the statistics that the prompts of a look are added to.

    A new pass begins anew, because its prompts are no fresh ones; so does a run that went back to
    an earlier look. A look that is repeated adds to what was there before it.
    """
    if not stored or stored["pass"] != pass_number or stored["look"] > look:
        return {}
    known: dict[str, list[float]] = stored["before" if stored["look"] == look else "after"]
    return known


def _verdicts(
    before: Sequence[ReplyMeasures],
    now: Sequence[ReplyMeasures],
    measured: Json,
    known: Mapping[str, list[float]],
    look: Look,
) -> list[QuantityReading]:
    """Return the verdict on each quantity of a domain."""
    found: list[tuple[Measure, Outcomes]] = [("format", outcomes_of("format", before, now))]
    accuracy = outcomes_of("accuracy", before, now)
    if accuracy.num_prompts:
        found.append(("accuracy", accuracy))
    # half for the bound of a look, half for the process, of each quantity
    num_parts = 2 * len(found)
    verdicts = []
    for measure, outcomes in found:
        tolerance = measured["tolerances"][measure]
        line = look.settings.act_at * tolerance
        statistic = list(known.get(measure, []))
        if look.step:
            statistic = bet(statistic, outcomes, measure, line)
        lower = outcomes.lower_points(measure, FALSE_ALARM_SHARE / (num_parts * look.num_tests))
        alarms = bool(statistic) and np.mean(statistic) >= num_parts * look.alarm_threshold
        if alarms:  # a loss above the line is certain, how far above is not
            lower = max(lower, math.nextafter(line, math.inf))
        upper = outcomes.upper_points(measure, look.green_error)
        verdicts.append(
            QuantityReading(
                measure=measure,
                outcomes=outcomes,
                tolerance=tolerance,
                delta=outcomes.loss_points(measure),
                lower_bound=lower,
                upper_bound=upper,
                state=state_of(lower, upper, line=line, tolerance=tolerance),
                statistic=statistic,
            )
        )
    return verdicts


def outcomes_of(
    measure: str, before: Sequence[ReplyMeasures], now: Sequence[ReplyMeasures]
) -> Outcomes:
    """Return the outcomes of a measure over the prompts that have it."""
    passed_before = []
    passed_now = []
    for was, present in zip(before, now, strict=True):
        earlier = was.value(measure)
        later = present.value(measure)
        if earlier is not None and later is not None:
            passed_before.append(earlier)
            passed_now.append(later)
    return Outcomes.of(passed_before, passed_now)


def _reading(name: str, verdicts: Sequence[QuantityReading], measured: Json, look: Look) -> Reading:
    """Return the reading of a domain: that of its worst quantity."""
    worst = max(verdicts, key=lambda verdict: verdict.badness)
    return Reading(
        domain=name,
        kind="generation",
        step=look.step,
        state=worst.state,
        delta=worst.delta,
        lower_bound=worst.lower_bound,
        upper_bound=worst.upper_bound,
        tolerance=worst.tolerance,
        hard_limit=measured["hard_limit"],
    )


def _events(
    name: str,
    language: str,
    verdicts: Sequence[QuantityReading],
    before: Sequence[ReplyMeasures],
    now: Sequence[ReplyMeasures],
) -> list[Json]:
    """Return the lines of one domain: quantities, the measures of the form, and the thinking."""
    events = []
    for verdict in verdicts:
        event = _rate_event(name, language, verdict.measure, verdict.outcomes)
        event |= {
            "delta": verdict.delta,
            "lower_bound": verdict.lower_bound,
            "upper_bound": verdict.upper_bound,
            "tolerance": verdict.tolerance,
            "state": verdict.state,
        }
        events.append(event)
    for measure in FORM_MEASURES:
        outcomes = outcomes_of(measure, before, now)
        events.append(_rate_event(name, language, measure, outcomes))
    lengths_before = [one.thinking_tokens for one in before]
    lengths_now = [one.thinking_tokens for one in now]
    events.append(
        {
            "domain": name,
            "language": language,
            "measure": "thinking_tokens",
            "rate": float(np.mean(lengths_now)),
            "baseline": float(np.mean(lengths_before)),
            "quantiles": np.quantile(lengths_now, QUANTILES).tolist(),
            "baseline_quantiles": np.quantile(lengths_before, QUANTILES).tolist(),
            "prompts": len(now),
        }
    )
    return events


def _rate_event(name: str, language: str, measure: str, outcomes: Outcomes) -> Json:
    return {
        "domain": name,
        "language": language,
        "measure": measure,
        "rate": outcomes.num_now / max(1, outcomes.num_prompts),
        "baseline": outcomes.num_before / max(1, outcomes.num_prompts),
        "prompts": outcomes.num_prompts,
        "lost": outcomes.lost,
        "won": outcomes.won,
    }

"""What the log of a run says about a checkpoint: the part of the model card that may be missing.

The log is read line by line, and only what the card shows is kept: that of a long run with many
sources has some hundred MB.
"""

from __future__ import annotations

import logging
from array import array
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt.resilience.best_effort import reason_of
from cpt.telemetry.event_reader import iter_events
from cpt.telemetry.run_tally import number, whole_number
from data_pipeline.escaping import escaped_line

log = logging.getLogger("cpt.export.logged_facts")

Json = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class HeldOutResult:
    """The last measurement of a domain of held-out text."""

    step: int
    """Optimizer steps done."""
    language: str
    """Language label of the domain."""
    baseline: float
    """Bits per byte before training."""
    bits_per_byte: float
    """Bits per byte now."""
    delta_percent: float
    """Change in percent."""
    ci_low: float
    """Lower end of the 95 % interval of the change, in percent."""
    ci_high: float
    """Upper end of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoggedFacts:
    """What was trained on, and how the held-out text changed."""

    tokens: dict[str, int]
    """Predicted tokens by source."""
    held_out: dict[str, HeldOutResult]
    """Last measurement by domain, in the order of their first ones."""


def read_logged_facts(metrics: Path, last_step: int) -> LoggedFacts | None:
    """Read the facts of the steps up to the last one; None, with a warning, if that fails.

    An export is worth more than the sentences that the log adds to its card, so no error is raised.

    Args:
        metrics: The run's metrics.jsonl; may be missing.
        last_step: Step of the checkpoint.
    """
    try:
        return logged_facts(iter_events(metrics, ("step", "guard")), last_step)
    except Exception as error:
        log.warning(
            "The model card will not show the predicted tokens and the held-out text: %s",
            reason_of(error),
        )
        log.debug("the log of the run cannot be used", exc_info=True)
        return None


def logged_facts(events: Iterable[Json], last_step: int) -> LoggedFacts:
    """Return the facts of events, in the order of the log.

    A step that was done twice, because the run went back to a checkpoint, counts once: its last
    event is the one that led to the weights.  What was measured from that step on was of weights
    that the run has left.  Events that lack a value are passed over.
    """
    tally = _TokenTally()
    measured: dict[str, list[HeldOutResult]] = {}
    for event in events:
        step = whole_number(event.get("step"))
        if step is None or step > last_step:
            continue
        if event["event"] == "step":
            tally.take(step, event.get("tokens_by_source"))
            for results in measured.values():
                while results and results[-1].step >= step:
                    results.pop()
        elif event.get("kind", "text") == "text" and step > 0:
            results = measured.setdefault(escaped_line(event.get("domain")), [])
            results.append(_held_out_result(step, event))
    held_out = {domain: results[-1] for domain, results in measured.items() if results}
    return LoggedFacts(tokens=tally.total(), held_out=held_out)


class _TokenTally:
    """The tokens of every step by source; a step takes eight bytes for each source."""

    def __init__(self) -> None:
        self._known_names: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._steps: dict[int, tuple[tuple[str, ...], array[int]]] = {}

    def take(self, step: int, counts: object) -> None:
        """Note the counts of a step, in place of those that an earlier event has given."""
        if not isinstance(counts, dict):
            return
        values = array("q")
        for count in counts.values():
            values.append(whole_number(count) or 0)
        names = tuple(counts)
        self._steps[step] = self._known_names.setdefault(names, names), values

    def total(self) -> dict[str, int]:
        """Return the sums over all steps."""
        total: Counter[str] = Counter()
        for names, values in self._steps.values():
            for name, value in zip(names, values, strict=True):
                total[name] += value
        return dict(total)


def _held_out_result(step: int, event: Json) -> HeldOutResult:
    return HeldOutResult(
        step=step,
        language=escaped_line(event.get("language")),
        baseline=number(event.get("baseline")),
        bits_per_byte=number(event.get("bits_per_byte")),
        delta_percent=number(event.get("delta_percent")),
        ci_low=number(event.get("ci_low")),
        ci_high=number(event.get("ci_high")),
    )

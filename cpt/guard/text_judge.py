"""From scores of held-out text to readings; pure, so that `cpt guard audit` repeats it.

    panel -> change since step 0 (paired_test.py)  -> reading, event
    fresh -> is a loss certain? (betting.py)       ->

The panel, which is scored at every look, gives the estimate and the bound that proves a domain
kept. Fresh documents, which one look alone scores, prove a loss; without them the panel does that,
too. A domain that is certainly worse than at its best look is no longer green, but this alone never
makes it red: web text adapts first and is then forgotten, and bits per byte below the baseline
would hide that.

The number of a look decides its fresh documents. Another `guard.interval_steps` repeats numbers,
and so does a return to an earlier checkpoint; documents that were bet on are not bet on again, so
the panel takes their place.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np

from cpt.guard.baseline import BASELINE_FILE, DomainBaseline, read_baseline, stored_baselines
from cpt.guard.betting import Detector, lower_bound, percent_changes
from cpt.guard.paired_test import CONFIDENCE, cluster_sums, compare_scores
from cpt.guard.score import Floats, as_floats
from cpt.guard.yardstick import Json, Judgement, Look, Reading, state_of
from data_pipeline.store.packing import Integers

DETECTED_PARTS = (0.0, 0.75, 1.0, 1.5, 2.0, 3.0)
"""Parts of the tolerance that a detector looks for, beside the line and the hard limit."""

USED = "used"
"""Key of the state of a domain that is no line of its detector."""


class TextJudge:
    """The pure half: the scores of the untouched model, which readings are compared with."""

    def __init__(self, baseline: Mapping[str, DomainBaseline]) -> None:
        """Take the scores of the untouched model by domain."""
        self.baseline = baseline

    @classmethod
    def stored(cls, folder: Path) -> TextJudge:
        """Read the baseline of a run; without one, no domain is known.

        Args:
            folder: <run_dir>/guard.
        """
        return cls(stored_baselines(read_baseline(folder / BASELINE_FILE)))

    def judge(self, scores: Json, state: Json, look: Look) -> Judgement:
        """Compare scores with the baseline; see `cpt.guard.yardstick.Judge`.

        Args:
            scores: `nats`: by domain, a list over the documents of the panel; `fresh`: by domain,
                a list over the fresh documents of this look; `best`: by domain, `step` and `nats`
                of the look before with the least nats of the panel.
            state: By domain, the state of its `Detector`, and `used`: the largest number of a look
                whose fresh documents were bet on.
            look: The look.
        """
        readings = []
        events = []
        detectors = dict(state)
        for name, nats in scores["nats"].items():
            before = self.baseline[name]
            fresh = as_floats(scores.get("fresh", {}).get(name, []))
            known = state.get(name, {})
            if len(fresh) and look.number > known.get(USED, 0):
                detector = Detector(lines_of(name, look), known)
                changes = percent_changes(fresh, before.fresh_at(look.number))
                lower = detector.add(changes, look.alarm_threshold)
                detectors[name] = {**detector.to_json(), USED: look.number}
            else:
                lower = panel_bound(
                    as_floats(nats), before.panel.nats, before.clusters, look.alarm_threshold
                )
            best = scores.get("best", {}).get(name)
            reading, event = read_panel(before, as_floats(nats), lower, best, look)
            readings.append(reading)
            events.append(event)
        return Judgement(readings=readings, state=detectors, events=events)

    def restarted(self, state: Json, domains: Collection[str]) -> Json:
        """Return the state without the detectors of some domains, which begin anew."""
        after = {}
        for name, known in state.items():
            if name not in domains:
                after[name] = known
            elif USED in known:  # documents stay used, whatever was won or lost on them
                after[name] = {USED: known[USED]}
        return after

    def returned(self, saved: Json, lost: Json) -> Json:
        """Return the saved bets, with the documents used that were bet on since then.

        They helped to prove the loss from which the run went back, so they would be more likely to
        prove one again.
        """
        after = dict(saved)
        for name, known in lost.items():
            if USED in known:
                before = saved.get(name, {})
                after[name] = {**before, USED: max(known[USED], before.get(USED, 0))}
        return after


def lines_of(name: str, look: Look) -> list[float]:
    """Return the losses, in percent, that a detector looks for in a domain."""
    tolerance, hard_limit = look.settings.limits(name)
    multiples = [part * tolerance for part in DETECTED_PARTS]
    return [look.settings.act_at * tolerance, hard_limit, *multiples]


def panel_bound(
    now: Floats, baseline: Floats, clusters: Integers | None, threshold: float
) -> float:
    """Return the loss that the panel alone proves, in percent; NaN if a score is not a number.

    The documents of a cluster count as one, whose change is the mean of theirs.

    Args:
        now: (documents,) nats of the present weights.
        baseline: (documents,) nats of the model that they are compared with.
        clusters: (documents,) cluster of each document; None if each is one of its own.
        threshold: See `cpt.guard.betting.lower_bound`.
    """
    changes = percent_changes(now, baseline)
    sizes = cluster_sums(np.ones(len(changes)), clusters)
    return lower_bound(cluster_sums(changes, clusters) / sizes, threshold)


def read_panel(
    before: DomainBaseline, nats: Floats, lower: float, best: Json | None, look: Look
) -> tuple[Reading, Json]:
    """Return the reading of a domain and the fields of its `guard` line.

    Args:
        before: Scores of the untouched model.
        nats: (documents,) scores of the panel.
        lower: The loss that is certain, in percent; NaN if a score is not a number.
        best: `step` and `nats` of the best look before, if there is one.
        look: The look.
    """
    name = before.panel.name
    tolerance, hard_limit = look.settings.limits(name)
    now = replace(before.panel, nats=nats)
    change = compare_scores(
        now,
        before.panel,
        clusters=before.clusters,
        upper_confidence=1 - look.green_error,
    )
    is_finite = np.isfinite(nats).all() and not math.isnan(lower)
    certain = lower if is_finite else None
    upper = change.upper_bound if math.isfinite(change.upper_bound) else None
    line = look.settings.act_at * tolerance
    state = state_of(certain, upper, line=line, tolerance=tolerance)
    if state == "green" and best is not None and is_below_best(before, nats, best, line):
        state = "amber"
    reading = Reading(
        domain=name,
        kind="text",
        step=look.step,
        state=state,
        delta=change.delta_percent if math.isfinite(change.delta_percent) else None,
        lower_bound=certain,
        upper_bound=upper,
        tolerance=tolerance,
        hard_limit=hard_limit,
    )
    event: Json = {
        "domain": name,
        "language": before.panel.language,
        "bits_per_byte": now.bits_per_byte,
        **asdict(change),
        "lower_bound": certain,
        **best_fields(nats, best),
    }
    return reading, event


def is_below_best(before: DomainBaseline, nats: Floats, best: Json, line: float) -> bool:
    """Return whether a domain has certainly lost as much as the line since its best look.

    It is certain at 95 % for this look alone: an error costs no more than a green checkpoint.
    """
    lost = panel_bound(nats, as_floats(best["nats"]), before.clusters, 1 / (1 - CONFIDENCE))
    return lost >= line


def best_fields(nats: Floats, best: Json | None) -> Json:
    """Return the fields of a `guard` line that compare with the best look before."""
    if best is None:
        return {}
    change = 100 * (nats.sum() / as_floats(best["nats"]).sum() - 1)
    return {"best_step": best["step"], "delta_from_best_percent": float(change)}

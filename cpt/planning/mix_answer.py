"""The share of the main language that a run can take: the answer that `cpt plan` prints.

Every domain needs a share of replay, which is known as an interval; the run must serve the domain
that needs most.  Both ends of the answer are therefore the largest over the domains:

    safe     the share that is enough with 99 %, for every domain: printed as the answer.  Too
             little for some domain it can only be if that domain's own end is wrong, so the
             certainty does not fall with the number of domains.
    least    the share that no domain could do with less; the 4 % that are left are divided over
             the domains, since any of them can be wrong here.

Nothing is said about shares that were not tried: an end beyond the probes is marked as such.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cpt.planning.mix_curve import (
    NUM_RESAMPLES,
    CurveDraws,
    Floats,
    draw_curves,
    resampled_changes,
)
from cpt.planning.mix_probe import Probe
from cpt.planning.mix_probe_check import MIN_PROBES, check_probes
from data_pipeline.tables import table

UNSAFE = 0.01
"""Probability that the printed share breaks the tolerance."""
UNDERRATED = 0.04
"""Probability that a larger share than the other end would have held it; together 5 %."""
CHECK_TAIL = 0.025
"""Half of what lies outside the 95 % interval of a left-out run."""
NUM_CHECK_RESAMPLES = 250
"""As `NUM_RESAMPLES`, for predicting a left-out run."""
SEED = 0
"""The same probes give the same answer."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NeededReplay:
    """The share of replay that keeps one domain within the tolerance, 0 to 1.

    The smallest share that was tried stands for it and all below; infinity for more than was tried.
    """

    least: float
    """It could hardly do with less."""
    middle: float
    """As likely too much as too little."""
    safe: float
    """It is enough with 99 %."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LeftOut:
    """A run and the prediction of it by all others, for one domain; changes in percent."""

    probe: str
    domain: str
    measured: float
    low: float
    """Lower end of the 95 % interval of a single run."""
    high: float

    @property
    def inside(self) -> bool:
        """Whether the run lies where the others say."""
        return self.low <= self.measured <= self.high


@dataclass(frozen=True, kw_only=True, slots=True)
class MixAnswer:
    """The answer for one tolerance."""

    tolerance_percent: float
    steps: int
    """Length of the run that it holds for."""
    curves: CurveDraws
    needed: dict[str, NeededReplay]
    """By domain."""
    document_error: dict[str, float]
    """Standard error of a change in percent that comes from the held-out documents, by domain."""

    @property
    def safe(self) -> float:
        """Share of replay that is enough for every domain with 99 %; infinite if none was tried."""
        return max(needed.safe for needed in self.needed.values())

    @property
    def least(self) -> float:
        """Share of replay that could at best be enough; infinite if none that was tried is."""
        return max(needed.least for needed in self.needed.values())

    @property
    def domain(self) -> str:
        """The domain that decides."""
        return max(self.needed, key=lambda name: (self.needed[name].safe, self.needed[name].middle))


def largest_main_share(
    probes: Sequence[Probe],
    tolerance_percent: float,
    planned_steps: int | None = None,
    num_resamples: int = NUM_RESAMPLES,
) -> MixAnswer:
    """Find the largest share of the main language at which every domain stays within tolerance.

    Args:
        probes: Runs that passed `check_probes`.
        tolerance_percent: Largest rise of bits per byte.
        planned_steps: Length of the planned run; by default that of the probes.
        num_resamples: How often the documents are drawn.
    """
    steps = planned_steps or probes[0].steps
    generator = np.random.default_rng(SEED)
    changes = {}
    document_error = {}
    for name, score in probes[0].scores.items():
        after = np.stack([probe.scores[name].after for probe in probes], axis=1)
        changes[name] = resampled_changes(score.before, after, generator, num_resamples)
        document_error[name] = float(changes[name].std(axis=0).mean())
    curves = _draw(probes, changes, steps, generator)
    return MixAnswer(
        tolerance_percent=tolerance_percent,
        steps=steps,
        curves=curves,
        needed=needed_by_domain(curves, tolerance_percent),
        document_error=document_error,
    )


def _draw(
    probes: Sequence[Probe],
    changes: dict[str, Floats],
    steps: int,
    generator: np.random.Generator,
) -> CurveDraws:
    shares = [probe.replay_share for probe in probes]
    lengths = [probe.steps for probe in probes]
    return draw_curves(shares, lengths, changes, steps, generator)


def needed_by_domain(curves: CurveDraws, tolerance_percent: float) -> dict[str, NeededReplay]:
    """Return the replay that each domain needs."""
    shares = curves.needed_share(tolerance_percent)
    tails = [UNDERRATED / len(curves.domains), 0.5, 1 - UNSAFE]
    # no interpolation: between a share and infinity there is nothing
    ends = np.quantile(shares, tails, axis=0, method="higher")
    needed = {}
    for index, name in enumerate(curves.domains):
        least, middle, safe = ends[:, index].tolist()
        needed[name] = NeededReplay(least=least, middle=middle, safe=safe)
    return needed


def leave_out(probes: Sequence[Probe]) -> list[LeftOut]:
    """Predict each run that lies between others from all others; too few runs give none.

    All runs scored the same documents, so their error is left out of both sides.
    """
    if len(probes) <= MIN_PROBES:
        return []
    generator = np.random.default_rng(SEED)
    shares = [probe.replay_share for probe in probes]
    left_out = []
    for probe in probes:
        if min(shares) < probe.replay_share < max(shares):
            others = [other for other in probes if other is not probe]
            left_out += _predict(probe, others, generator)
    return left_out


def _predict(
    probe: Probe, others: Sequence[Probe], generator: np.random.Generator
) -> list[LeftOut]:
    """Return what the other runs say of one, for every domain."""
    changes = {}
    for name in probe.scores:
        measured = [other.scores[name].change_percent for other in others]
        changes[name] = np.tile(measured, (NUM_CHECK_RESAMPLES, 1))
    curves = _draw(others, changes, probe.steps, generator)
    predicted = curves.at(probe.replay_share)
    predicted += curves.run_spread * generator.normal(size=predicted.shape)
    low, high = np.quantile(predicted, [CHECK_TAIL, 1 - CHECK_TAIL], axis=0)
    left_out = []
    for index, (name, score) in enumerate(probe.scores.items()):
        left_out.append(
            LeftOut(
                probe=probe.name,
                domain=name,
                measured=score.change_percent,
                low=float(low[index]),
                high=float(high[index]),
            )
        )
    return left_out


def describe(
    probes: Sequence[Probe], tolerance_percent: float, planned_steps: int | None = None
) -> str:
    """Return the plan for people.

    Raises:
        ConfigError: the probes cannot be compared, or say nothing about the planned length.
    """
    check_probes(probes, planned_steps)
    answer = largest_main_share(probes, tolerance_percent, planned_steps)
    lines = [
        _probe_table(probes),
        "",
        *answer_lines(answer, probes),
        "",
        _domain_table(answer),
    ]
    left_out = leave_out(probes)
    if left_out:
        lines += ["", *_left_out_lines(left_out)]
    return "\n".join(lines)


def _probe_table(probes: Sequence[Probe]) -> str:
    language = probes[0].main_language
    domains = list(probes[0].scores)
    rows = []
    for probe in sorted(probes, key=lambda probe: (probe.steps, probe.replay_share)):
        main_percent = 100 * (1 - probe.replay_share)
        row = [probe.name, f"{probe.steps}", f"{main_percent:.1f}", f"{probe.gain_percent:.2f}"]
        row += [f"{probe.scores[domain].change_percent:+.2f}" for domain in domains]
        rows.append(row)
    return table(["probe", "steps", f"{language} %", f"{language} gain %", *domains], rows)


def answer_lines(answer: MixAnswer, probes: Sequence[Probe]) -> list[str]:
    """Return the answer in words."""
    language = probes[0].main_language
    largest_main = 1 - answer.curves.smallest_share
    tolerance = f"{answer.tolerance_percent:g} %"
    if math.isinf(answer.safe):
        lines = _lines_without_answer(answer, tolerance)
    elif answer.safe <= answer.curves.smallest_share:
        lines = [
            f"Within {tolerance}: {language} may have at least {100 * largest_main:.1f} %; more "
            "was not tried."
        ]
    else:
        lines = [
            f"Within {tolerance}: {language} may have {100 * (1 - answer.safe):.1f} %; "
            f"{answer.domain} decides.",
            f"  That is the low end, which holds with 99 %. It could be {_other_end(answer)} "
            "(95 % interval).",
        ]
    lines.append(_scope(answer, probes))
    return lines


def _other_end(answer: MixAnswer) -> str:
    """Return the end of the interval that asks for the least replay."""
    share = f"{100 * (1 - answer.least):.1f} %"
    if answer.least <= answer.curves.smallest_share:
        return f"{share} or more, which was not tried"
    return f"as much as {share}"


def _lines_without_answer(answer: MixAnswer, tolerance: str) -> list[str]:
    """Return what the probes say if no share that was tried is surely enough."""
    domain = answer.domain
    most = f"{100 * answer.curves.largest_share:.1f} % replay"
    if math.isinf(answer.least):
        return [f"No probe is within {tolerance}: {domain} needs more than {most}, the most tried."]
    index = answer.curves.domains.index(domain)
    run_error = float(np.median(answer.curves.run_spread[:, index]))
    document_error = answer.document_error[domain]
    if document_error > run_error:
        cure = "more held-out documents (held_out_share, guard.max_documents)"
    else:
        cure = "one more probe at a share that was run, with another seed,"
    return [
        f"No share that was tried keeps {domain} within {tolerance} with 99 %: it may need more "
        f"than {most}, the most tried.",
        f"  Add a probe with more replay; or, since runs of {domain} scatter by {run_error:.2f} % "
        f"and its documents by {document_error:.2f} %, {cure} narrows the interval.",
    ]


def _scope(answer: MixAnswer, probes: Sequence[Probe]) -> str:
    """Return for which runs the answer holds."""
    lengths = sorted({probe.steps for probe in probes})
    if len(lengths) == 1:
        return f"  For runs of {answer.steps:,} steps only, as long as the probes."
    told = " and ".join(f"{length:,}" for length in lengths)
    return f"  For runs of {answer.steps:,} steps, from probes of {told}."


def _domain_table(answer: MixAnswer) -> str:
    """Return what each domain needs, and what makes it uncertain."""
    run_spread = np.median(answer.curves.run_spread, axis=0)
    rows = []
    for index, (name, needed) in enumerate(answer.needed.items()):
        ends = [_percent_or_bound(end, answer) for end in (needed.least, needed.safe)]
        errors = [f"{run_spread[index]:.2f}", f"{answer.document_error[name]:.2f}"]
        rows.append([name, *ends, *errors])
    header = ["domain", "replay % at least", "surely enough", "order of data +-", "documents +-"]
    return table(header, rows)


def _percent_or_bound(share: float, answer: MixAnswer) -> str:
    """Return a share of replay in percent; an end beyond the probes is marked."""
    if math.isinf(share):
        return f">{100 * answer.curves.largest_share:.1f}"
    if share <= answer.curves.smallest_share:
        return f"<={100 * answer.curves.smallest_share:.1f}"
    return f"{100 * share:.1f}"


def _left_out_lines(left_out: Sequence[LeftOut]) -> list[str]:
    """Return how well each probe is predicted by the others."""
    num_inside = sum(one.inside for one in left_out)
    lines = [
        f"Predicted from the other probes: {num_inside} of {len(left_out)} lie in the 95 % "
        "interval of a single run."
    ]
    for one in left_out:
        if not one.inside:
            lines.append(
                f"  {one.probe}: {one.domain} predicted {one.low:+.2f} to {one.high:+.2f}, "
                f"measured {one.measured:+.2f}: OUTSIDE"
            )
    return lines

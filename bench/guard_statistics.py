"""Simulate what the guard calls lost and kept, and what is: false alarms, power, states, sizes.

    python bench/guard_statistics.py [--runs 200] [--json FILE] [--svg FILE]

"Before" is the test that the guard had until November 2026, kept here: Student's t on one panel of
256 documents, divided over all looks and domains, with everything green that it did not call lost.
"After" is the code of cpt/guard: bets (betting.py) on the panel or on fresh documents, and green
only below the tolerance (paired_test.py). Effects of documents are invented; their shapes and the
sizes of runs are those of the tables.

    false alarms   runs of 4 domains and 50 looks in which a bound was above the true mean
    power          runs of 4 domains and 125 looks, the loss of one rising over 20 looks
    sizes          documents that a run takes, by tolerance
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from cpt.config import DomainLimits, GuardSection  # noqa: E402
from cpt.guard.betting import (  # noqa: E402
    LARGEST_GAIN,
    Detector,
    log_mean,
    log_wealth,
)
from cpt.guard.drawing import alarm_documents, fresh_per_look  # noqa: E402
from cpt.guard.paired_test import (  # noqa: E402
    cluster_sums,
    margin_of_error,
)
from cpt.guard.requirements import kept_documents  # noqa: E402
from cpt.guard.student import student_quantile  # noqa: E402
from cpt.guard.yardstick import FALSE_ALARM_SHARE, state_of  # noqa: E402
from data_pipeline.charts import ALARM, PALETTE, Line, as_svg, draw_lines, new_figure  # noqa: E402

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Floats = npt.NDArray[np.float64]
Shape = Callable[[np.random.Generator, int], Floats]

DOMAINS = 4
SPREAD = 2.0
"""Percent: standard deviation of the change over documents."""
LASTING = 0.9
"""Share of the variance of a document that stays over a run."""
SIZE_SPREAD = 0.6
"""Standard deviation of the logarithm of a document's nats."""
TOLERANCE = 1.0
LINE = 0.5
PANEL = 256
FRESH = 100
RAMP = 20
STATES = ("green", "amber", "red")


def normal(generator: np.random.Generator, count: int) -> Floats:
    return generator.normal(size=count)


def heavy(generator: np.random.Generator, count: int) -> Floats:
    return generator.standard_t(3, count) / math.sqrt(3)


def right_skew(generator: np.random.Generator, count: int) -> Floats:
    raw = np.exp(generator.normal(size=count))
    return np.asarray((raw - math.exp(0.5)) / math.sqrt((math.e - 1) * math.e))


def left_skew(generator: np.random.Generator, count: int) -> Floats:
    return -right_skew(generator, count)


def rare_gain(generator: np.random.Generator, count: int) -> Floats:
    """One document in a hundred gains 18 %, as one that is learned by heart would."""
    share = 0.01
    gains = -(generator.random(count) < share).astype(np.float64)
    scaled = (gains + share) / math.sqrt(share * (1 - share))
    return 0.9 * scaled + 0.436 * generator.normal(size=count)


SHAPES: dict[str, Shape] = {
    "normal": normal,
    "t with 3 degrees": heavy,
    "left skew": left_skew,
    "1 % gain 18 %": rare_gain,
    "right skew": right_skew,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class FalseAlarms:
    """Share of runs, in percent, in which a bound was above the true mean."""

    shape: str
    documents: int
    before: float
    panel: float
    fresh: float | None


@dataclass(frozen=True, kw_only=True, slots=True)
class Power:
    """What a guard says of a domain whose loss rises over 20 looks and stays."""

    guard: str
    loss: float
    found: float
    """Percent of the runs in which a loss was called proven."""
    median_look: float
    """Look at which it was, of those in which it was."""
    green: float
    """Percent of the looks after the rise."""
    amber: float
    red: float


def bound_before(changes: Floats, nats: Floats, num_tests: int) -> float:
    """Return the bound of before: Student's t, Bonferroni over looks and domains."""
    margin = margin_of_error(nats * (1 + changes / 100), nats, FALSE_ALARM_SHARE / num_tests)
    return float((nats * changes).sum() / nats.sum()) - margin


def is_won(changes: Floats, line: float, threshold: float) -> bool:
    """Return whether a bet that the mean is above a line is won: the bound is not below it."""
    limited = np.maximum(changes, -LARGEST_GAIN)
    return log_mean(log_wealth(limited, line)) >= math.log(threshold)


def effects(
    generator: np.random.Generator, shape: Shape, count: int, looks: int, spread: float = SPREAD
) -> Floats:
    """Return (looks, documents) changes in percent of which most lasts over the run."""
    lasting = shape(generator, count)
    passing = generator.normal(size=(looks, count))
    return spread * (math.sqrt(LASTING) * lasting + math.sqrt(1 - LASTING) * passing)


def sizes_of(generator: np.random.Generator, count: int) -> Floats:
    return np.exp(generator.normal(6, SIZE_SPREAD, count))


def false_alarms(shape: str, count: int, runs: int, looks: int = 50) -> FalseAlarms:
    """Simulate runs that lose nothing: the true mean is 0, and for fresh documents at the line."""
    generator = np.random.default_rng(1)
    num_tests = DOMAINS * (looks + 1)
    threshold = num_tests / FALSE_ALARM_SHARE
    wrong = dict.fromkeys(("before", "panel", "fresh"), 0)
    for _ in range(runs):
        seen = set()
        for _ in range(DOMAINS):
            nats = sizes_of(generator, count)
            for changes in effects(generator, SHAPES[shape], count, looks):
                if bound_before(changes, nats, num_tests) > 0:
                    seen.add("before")
                if is_won(changes, 0.0, threshold):
                    seen.add("panel")
            detector = Detector([LINE])
            for _ in range(looks):
                changes = LINE + SPREAD * SHAPES[shape](generator, count)
                if detector.add(np.maximum(changes, -LARGEST_GAIN), threshold) >= LINE:
                    seen.add("fresh")
        for name in seen:
            wrong[name] += 1
    shares = {name: 100 * number / runs for name, number in wrong.items()}
    return FalseAlarms(shape=shape, documents=count, **shares)


def clustered_alarms(size: int, common: float, runs: int, looks: int = 50) -> FalseAlarms:
    """Simulate runs that lose nothing, whose 256 documents lie in clusters.

    Args:
        size: Documents of a cluster.
        common: Share of the variance that the documents of a cluster have in common.
        runs: How many.
        looks: Looks of a run.
    """
    generator = np.random.default_rng(2)
    num_tests = DOMAINS * (looks + 1)
    threshold = num_tests / FALSE_ALARM_SHARE
    clusters = np.repeat(np.arange(PANEL // size), size)
    counts = cluster_sums(np.ones(PANEL), clusters)
    before = panel = 0
    for _ in range(runs):
        wrong_before = wrong_panel = False
        for _ in range(DOMAINS):
            nats = sizes_of(generator, PANEL)
            own = effects(generator, normal, PANEL, looks)
            shared = SPREAD * generator.normal(size=PANEL // size)[clusters]
            for look in own:
                changes = math.sqrt(1 - common) * look + math.sqrt(common) * shared
                wrong_before |= bound_before(changes, nats, num_tests) > 0
                means = cluster_sums(changes, clusters) / counts
                wrong_panel |= is_won(means, 0.0, threshold)
        before += wrong_before
        panel += wrong_panel
    return FalseAlarms(
        shape=f"clusters of {size}, {common:g} of the variance in common",
        documents=PANEL,
        before=100 * before / runs,
        panel=100 * panel / runs,
        fresh=None,
    )


def one_run(
    guard: str, loss: float, generator: np.random.Generator, looks: int
) -> tuple[int | None, list[str]]:
    """Return the first look at which a loss is called proven, and the state of every look."""
    spread = max(SPREAD, 1.15 * loss)
    means = loss * np.minimum(1.0, np.arange(1, looks + 1) / RAMP)
    num_tests = DOMAINS * (looks + 1)
    threshold = num_tests / FALSE_ALARM_SHARE
    count = int(guard.split()[2])
    nats = sizes_of(generator, count)
    panel = effects(generator, heavy, count, looks, spread)
    detector = Detector([LINE])
    states = []
    for mean, effect in zip(means, panel, strict=True):
        changes = mean + effect
        if guard.startswith("before"):
            red = bound_before(changes, nats, num_tests) > LINE
            states.append("red" if red else "green")
            continue
        estimate = float((nats * changes).sum() / nats.sum())
        upper = estimate + margin_of_error(nats * (1 + changes / 100), nats, 0.05)
        if "fresh" in guard:
            fresh = np.maximum(mean + spread * heavy(generator, FRESH), -LARGEST_GAIN)
            lower = detector.add(fresh, threshold)
        else:
            lower = LINE if is_won(changes, LINE, threshold) else -LARGEST_GAIN
        states.append(state_of(lower, upper, line=LINE, tolerance=TOLERANCE))
    found = states.index("red") + 1 if "red" in states else None
    return found, states


GUARDS = ("before, panel 256", "after, panel 256 and 100 fresh", "after, panel 900")


def power(guard: str, loss: float, runs: int, looks: int = 125) -> Power:
    """Simulate a domain that loses."""
    generator = np.random.default_rng(3)
    found = []
    counts = dict.fromkeys(STATES, 0)
    for _ in range(runs):
        look, states = one_run(guard.replace(",", ""), loss, generator, looks)
        if look is not None:
            found.append(look)
        for state in states[RAMP:]:
            counts[state] += 1
    total = sum(counts.values())
    return Power(
        guard=guard,
        loss=loss,
        found=100 * len(found) / runs,
        median_look=float(np.median(found)) if found else math.nan,
        **{state: 100 * number / total for state, number in counts.items()},
    )


def needed_before(tolerance: float, num_tests: int) -> int:
    """Return how many documents the guard asked for before: noise below the tolerance, no more."""
    count = 3
    while (
        student_quantile(FALSE_ALARM_SHARE / num_tests, count - 1) * SPREAD / math.sqrt(count)
        > tolerance
    ):
        count += 1
    return count


def size_rows() -> list[list[str]]:
    """Return the documents that a run of four domains takes, by tolerance and looks."""
    rows = []
    for looks in (10, 50, 125):
        for tolerance in (0.5, 1.0, 2.0, 5.0):
            limits = DomainLimits(tolerance_percent=tolerance, hard_limit_percent=50.0)
            settings = GuardSection(interval_steps=1, domains={"english": limits})
            tests = DOMAINS * (looks + 1)
            fresh = fresh_per_look(settings, "english", 10**9, looks + 1, DOMAINS)
            rows.append(
                [
                    str(looks),
                    f"{tolerance:g} %",
                    f"{needed_before(tolerance, tests):,}",
                    f"{alarm_documents(settings, 'english', tests):,}",
                    f"{kept_documents(settings, 'english'):,} + {looks + 1} x {fresh:,}",
                ]
            )
    return rows


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [f"| {' | '.join(header)} |", f"|{'---|' * len(header)}"]
    for row in rows:
        lines.append(f"| {' | '.join(row)} |")
    return "\n".join(lines)


def alarm_rows(found: Sequence[FalseAlarms]) -> list[list[str]]:
    rows = []
    for one in found:
        fresh = "" if one.fresh is None else f"{one.fresh:.1f}"
        rows.append([one.shape, str(one.documents), f"{one.before:.1f}", f"{one.panel:.1f}", fresh])
    return rows


def power_rows(found: Sequence[Power]) -> list[list[str]]:
    rows = []
    for one in found:
        look = "" if math.isnan(one.median_look) else f"{one.median_look:.0f}"
        shares = [f"{share:.0f}" for share in (one.green, one.amber, one.red)]
        rows.append([one.guard, f"{one.loss:g} %", f"{one.found:.0f}", look, *shares])
    return rows


@as_svg
def states_figure(found: Sequence[Power]) -> Figure:
    """Draw the share of the looks in each state over the true loss, before and after."""
    figure, charts = new_figure(900, 330, columns=2)
    colors = {"green": PALETTE[2], "amber": PALETTE[1], "red": ALARM}
    for axes, guard in zip(charts, GUARDS[:2], strict=True):
        own = [one for one in found if one.guard == guard]
        lines = []
        for state, color in colors.items():
            shares = [getattr(one, state) for one in own]
            if any(shares):
                losses = [one.loss for one in own]
                lines.append(Line(label=state, x=losses, y=shares, color=color))
        axes.set_ylim(0, 100)
        draw_lines(
            axes,
            lines,
            title=guard,
            x_label="true loss, % (tolerance 1 %)",
            y_label="% of the looks",
        )
    return figure


def main() -> None:
    parser = argparse.ArgumentParser(description="Simulations of the guard's statistics.")
    parser.add_argument("--runs", type=int, default=200)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path)
    options = parser.parse_args()
    started = time.perf_counter()
    alarms = []
    for count in (50, PANEL):
        alarms += [false_alarms(shape, count, options.runs) for shape in SHAPES]
    for size, common in ((8, 0.3), (16, 0.5)):
        alarms.append(clustered_alarms(size, common, options.runs))
    header = ["documents' changes", "documents", "before", "after, panel", "after, fresh"]
    print("Runs with a false alarm, %, nominal 1\n")
    print(markdown(header, alarm_rows(alarms)), flush=True)
    found = []
    losses = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    for guard in GUARDS:
        found += [power(guard, loss, max(1, options.runs // 4)) for loss in losses]
    header = ["guard", "true loss", "found %", "median look", "green", "amber", "red"]
    print(f"\nOf {max(1, options.runs // 4)} runs; states in % of the looks after the rise\n")
    print(markdown(header, power_rows(found)), flush=True)
    header = ["looks", "tolerance", "before", "after, panel alone", "after, panel + fresh"]
    print("\nDocuments of a domain that a run takes\n")
    print(markdown(header, size_rows()))
    if options.json:
        content = {
            "false_alarms": [asdict(one) for one in alarms],
            "power": [asdict(one) for one in found],
        }
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if options.svg:
        options.svg.write_text(states_figure(found), encoding="utf-8")
    print(f"\n{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    main()

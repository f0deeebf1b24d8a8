"""Try `cpt plan --english_tolerance` on simulated probes whose truth is known.

    python bench/plan_curve.py [--plants 300] [--only 6-probes ...] [--json FILE]

tests/support/mix_plants.py draws probes from five laws: the planner's own form, the same with the
law's second term, CMR's power of the main language, a straight line in the logarithm, and a
saturating exponential.  For each set of probes the planner answers, and so does the straight line
that it was before (bench/plan_curve_parts/log_line.py).  Of every hundred answers the table counts

    covers      the true share lies in the 95 % interval
    breaks      the printed share breaks the tolerance for the mean of many runs
    none        no share that was tried is certain enough, so none is printed
    width       median width of the interval, in points of the main language
    price       median of what the printed share gives away of the true one, in points

The planner prints the low end of its interval, the line printed its middle.  The whole table takes
some 20 minutes of one core (extrapolated from a few rows), and a fifth of that with --plants 60.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from plan_curve_parts import log_line  # noqa: E402

from cpt.planning.mix_answer import largest_main_share  # noqa: E402
from data_pipeline.tables import table  # noqa: E402
from tests.support.mix_plants import LAWS, TOLERANCE, Plant, Setting, simulate  # noqa: E402

NUM_RESAMPLES = 100
"""Fewer than the planner takes: a tenth of the time, and quantiles that are a little noisier."""
ROUNDING = 1e-3
"""Shares of the truth are known to this."""

FIVE = (0.05, 0.15, 0.15, 0.35, 0.7)
SIX = (0.05, 0.1, 0.2, 0.2, 0.4, 0.7)
EIGHT = (0.05, 0.1, 0.15, 0.25, 0.25, 0.4, 0.55, 0.75)
NOISE = ((0.05, 0.8), (0.15, 1.6), (0.3, 1.6), (0.1, 4.8))
"""Standard deviations of a run and of a document in percent: 256 documents make the latter a
standard error of 0.06, 0.12 and 0.36.
"""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a method says of one plant; shares of replay, infinite if more than was tried."""

    printed: float
    least: float
    most: float


Method = Callable[[Plant, Setting], Answer]


def by_line(plant: Plant, setting: Setting) -> Answer:
    """Answer by the straight line."""
    printed, least, most = log_line.needed_shares(plant.probes, TOLERANCE)
    return Answer(printed, least, most)


def by_curve(plant: Plant, setting: Setting) -> Answer:
    """Answer as the planner does."""
    found = largest_main_share(plant.probes, TOLERANCE, setting.planned_steps, NUM_RESAMPLES)
    return Answer(found.safe, found.least, found.safe)


METHODS: dict[str, Method] = {"line": by_line, "curve": by_curve}


def cells() -> dict[str, list[Setting]]:
    """Return the settings of each row of the table."""
    rows: dict[str, list[Setting]] = {}
    for number, shares in ((5, FIVE), (6, SIX), (8, EIGHT)):
        for law in LAWS:
            settings = []
            for run_spread, document_spread in NOISE:
                one = Setting(
                    law=law, shares=shares, run_spread=run_spread, document_spread=document_spread
                )
                settings.append(one)
            rows[f"{number}-probes {law}"] = settings
    six = Setting(shares=SIX)
    rows["6-probes uneven runs"] = [replace(six, uneven_runs=True)]
    rows["6-probes correlated runs"] = [replace(six, correlation=0.7)]
    rows["6-probes 50 documents"] = [replace(six, num_documents=50)]
    rows["6-probes one domain"] = [replace(six, num_domains=1)]
    rows["6-probes eight domains"] = [replace(six, num_domains=8)]
    for planned in (200, 400, 800):
        two_lengths = replace(
            six,
            shares=(0.05, 0.15, 0.3, 0.3, 0.7, 0.05, 0.3, 0.7),
            steps=(100,) * 5 + (200,) * 3,
            planned_steps=planned,
        )
        exponents = (-0.15, 0.0, 0.15, 0.3)
        settings = [replace(two_lengths, length_exponent=one) for one in exponents]
        rows[f"lengths 100 and 200 for {planned}"] = settings
    return rows


def measure(method: Method, setting: Setting, num_plants: int, seed: int) -> list[dict[str, Any]]:
    """Let a method answer for many plants of one setting."""
    generator = np.random.default_rng(seed)
    most_tried = max(setting.shares)
    found = []
    for _ in range(num_plants):
        plant = simulate(setting, generator)
        answer = method(plant, setting)
        truth = plant.needed_share
        found.append(
            {
                "covers": answer.least <= truth + ROUNDING and truth <= answer.most + ROUNDING,
                "breaks": answer.printed < truth - ROUNDING,
                "none": answer.printed > most_tried,
                "width": min(answer.most, most_tried) - min(answer.least, most_tried),
                "price": min(answer.printed, most_tried) - truth,
            }
        )
    return found


def summary(found: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Return percentages, and medians in points."""
    shares = {key: 100 * float(np.mean([one[key] for one in found])) for key in RATES}
    points = {key: 100 * float(np.median([one[key] for one in found])) for key in MEDIANS}
    return {**shares, **points}


RATES = ("covers", "breaks", "none")
MEDIANS = ("width", "price")


def main() -> None:
    """Print the table, row by row as it is measured."""
    parser = argparse.ArgumentParser(description="The planner of the mix on simulated probes.")
    parser.add_argument("--plants", type=int, default=300, help="of each setting")
    parser.add_argument("--only", nargs="+", default=[""], help="rows that begin with one of these")
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    results = []
    rows = []
    for name, settings in cells().items():
        if not name.startswith(tuple(options.only)):
            continue
        for method in options.methods:
            if method == "line" and name.startswith("lengths"):
                continue
            found = []
            for index, setting in enumerate(settings):
                seed = zlib.crc32(f"{name} {index}".encode())
                found += measure(METHODS[method], setting, options.plants, seed)
            result = summary(found)
            results.append({"row": name, "method": method, "plants": len(found), **result})
            rows.append([name, method, *(f"{result[key]:.1f}" for key in (*RATES, *MEDIANS))])
            print(time.strftime("%H:%M:%S"), *rows[-1], flush=True)
    print(table(["probes and law", "method", *RATES, *MEDIANS], rows))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

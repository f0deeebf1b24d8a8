"""Table and plot of the guard's proof: what Japanese gained, what English paid."""

from __future__ import annotations

import statistics
from typing import Any

import numpy as np

from cpt.telemetry.plot import (
    ALARM,
    INK,
    MUTED,
    PALETTE,
    Plot,
    bin_series,
    clean,
    scale_over,
    standalone,
)

JAPANESE = "japanese"
SIZE = (720, 420)
LABEL_ROOM = 150
HEADER = 40


def gain(run: dict[str, Any]) -> float:
    """Bits per byte that Japanese lost, in percent of the untouched model's."""
    return -float(run["change_percent"][JAPANESE])


def english(run: dict[str, Any]) -> dict[str, float]:
    """Change of every other domain in percent; positive is worse."""
    return {
        domain: change for domain, change in run["change_percent"].items() if domain != JAPANESE
    }


def by_arm(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Runs of each arm, in the order in which arms first appear."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        arms.setdefault(run["arm"], []).append(run)
    return arms


def share_of_naive(runs: list[dict[str, Any]], run: dict[str, Any]) -> float:
    """Japanese gain in percent of what no replay gains with the same order of the data; NaN without
    such a run.
    """
    naive = [other for other in runs if other["arm"] == "naive" and other["seed"] == run["seed"]]
    return 100 * gain(run) / gain(naive[0]) if naive else float("nan")


def table(runs: list[dict[str, Any]]) -> str:
    """A Markdown table with one line per arm: medians over seeds, and the worst domain of any
    seed.
    """
    domains = list(english(runs[0]))
    lines = [
        f"| arm | seeds | replay % | Japanese gain % | of naive % | {' | '.join(domains)} | worst domain of any seed |",
        "|" + "---|" * (len(domains) + 6),
    ]
    for arm, group in by_arm(runs).items():
        middles = [statistics.median(english(run)[domain] for run in group) for domain in domains]
        worst = max(change for run in group for change in english(run).values())
        lines.append(
            f"| {arm} | {len(group)} | {100 * statistics.median(run['replay_share'] for run in group):.1f} "
            f"| {statistics.median(map(gain, group)):.2f} "
            f"| {statistics.median(share_of_naive(runs, run) for run in group):.1f} "
            f"| {' | '.join(f'{middle:+.2f}' for middle in middles)} | {worst:+.2f} |"
        )
    return "\n".join(lines)


def draw(runs: list[dict[str, Any]], tolerance_percent: float, source: str) -> str:
    """A standalone SVG: each run a point, each arm a colour; right is more Japanese, down is less
    English lost.
    """
    gains = np.asarray([gain(run) for run in runs])
    worst = np.asarray([max(english(run).values()) for run in runs])
    x, y = scale_over([gains]), scale_over([worst], include=[0.0, tolerance_percent])
    labels = (
        "Japanese gain, % of the untouched model's bits per byte",
        "worst English domain, change in %",
    )
    plot = Plot(size=SIZE, x=x, y=y, labels=labels, right=LABEL_ROOM)
    plot.horizontal(0.0, MUTED, dash="")
    plot.horizontal(tolerance_percent, ALARM, label=f"tolerance {tolerance_percent:+g} %")
    ends = []
    for index, (arm, group) in enumerate(by_arm(runs).items()):
        color = ALARM if arm == "guard" else PALETTE[index % len(PALETTE)]
        for run in group:
            point = np.asarray([gain(run)]), np.asarray([max(english(run).values())])
            plot.line(bin_series(*point), color, dots=True)
        ends.append((statistics.median(max(english(run).values()) for run in group), color, arm))
    plot.right_labels(ends)
    width, height = SIZE[0], SIZE[1] + HEADER + 24
    body = (
        f'<text x="60" y="24" font-weight="600" font-size="14" fill="{INK}">What Japanese gains and English pays</text>'
        f'<svg y="{HEADER}" width="{SIZE[0]}" height="{SIZE[1]}">{plot.svg("English change over Japanese gain")}</svg>'
        f'<text x="60" y="{height - 8}" fill="{MUTED}">{clean(source, 200)}</text>'
    )
    return standalone(body, width, height)

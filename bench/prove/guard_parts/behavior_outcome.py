"""Outcome, table and plot of the behavior proof."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cpt.guard.student import student_quantile
from cpt.offline.evaluation.significance import compare_answers
from cpt.telemetry.metrics import read_events
from data_pipeline.charts import ALARM, MUTED, PALETTE, as_svg, draw_level, new_figure
from guard_parts.arms import ARMS, STEERED, YOKED, mean_shares
from guard_parts.base import ANSWERS
from guard_parts.mixes import ENGLISH, ENGLISH_DOMAINS, JAPANESE, OWN
from guard_parts.tasks import FAMILIES

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LOST_POINTS = 5.0
"""Fall of the accuracy of a family, in percentage points, that is a loss."""
LEVEL = 0.01
"""Significance level of the one-sided mid-p McNemar test."""


def outcome(run_dir: Path, base_answers: Path) -> dict[str, Any]:
    """Return what a run gained and lost, and what its guard said in the end."""
    events = read_events(run_dir / "metrics.jsonl")
    decisions = [event for event in events if event["event"] == "guard_decision"]
    states = {one["domain"]: one["state"] for one in decisions[-1]["evidence"]}
    change = {}
    for event in events:
        if event["event"] == "guard" and event.get("kind", "text") == "text":
            change[event["domain"]] = event["delta_percent"]
    shares = mean_shares(run_dir)
    guarded = [name for name in states if name != JAPANESE]
    actions: dict[str, int] = {}
    for decision in decisions:
        actions[decision["action"]] = actions.get(decision["action"], 0) + 1
    return {
        "states": states,
        "text_green": all(states[name] == "green" for name in ENGLISH_DOMAINS),
        "guard_green": all(states[name] == "green" for name in guarded),
        "change_percent": change,
        "english_share": shares[ENGLISH],
        "own_share": shares[OWN],
        "accuracy": accuracy_changes(
            json.loads(base_answers.read_text()),
            json.loads((run_dir / ANSWERS).read_text()),
        ),
        "actions": actions,
    }


def together(own: list[dict[str, Any]], earlier: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the runs of two reports; of a run that both have, that of the first one."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for run in [*own, *earlier]:
        found.setdefault((run["base"], run["order"], run["arm"]), run)
    arms = list(ARMS)
    return sorted(
        found.values(), key=lambda run: (run["base"], run["order"], arms.index(run["arm"]))
    )


def accuracy_changes(
    before: list[dict[str, Any]], now: list[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Compare the answers to the same items by family.

    Returns:
        By family: shares of right answers before and now, items lost and won, the one-sided mid-p
        value of McNemar's test, the share in good form, and whether the accuracy is lost.
    """
    changes = {}
    for family in FAMILIES:
        old = [item for item in before if item["family"] == family]
        new = [item for item in now if item["family"] == family]
        right_before = np.array([float(item["right"]) for item in old])
        right_now = np.array([float(item["right"]) for item in new])
        compared = compare_answers(right_before, right_now, 1 - LEVEL, LEVEL)
        changes[family] = {
            "items": len(old),
            "before": float(right_before.mean()),
            "now": float(right_now.mean()),
            "good_form": statistics.fmean(float(item["good_form"]) for item in new),
            "lost_items": compared.lost,
            "won_items": compared.won,
            "p_value": compared.p_value,
            "lost": 100 * compared.drop >= LOST_POINTS and compared.p_value < LEVEL,
        }
    return changes


def is_lost(run: dict[str, Any]) -> bool:
    """Return whether the accuracy of a family is lost."""
    return any(family["lost"] for family in run["accuracy"].values())


def worst_fall(run: dict[str, Any]) -> float:
    """Return the largest fall of the accuracy of a family in percentage points."""
    return max(100 * (one["before"] - one["now"]) for one in run["accuracy"].values())


def japanese_gain(run: dict[str, Any]) -> float:
    """Return the fall of bits per byte of Japanese, in percent of the untouched model's."""
    return -float(run["change_percent"][JAPANESE])


def worst_english(run: dict[str, Any]) -> float:
    """Return the change of the worst English domain in percent; positive is worse."""
    return max(float(run["change_percent"][name]) for name in ENGLISH_DOMAINS)


def false_greens(runs: list[dict[str, Any]], kind: str) -> tuple[int, int]:
    """Return the runs that are green while an accuracy is lost, and the runs with a lost accuracy.

    Args:
        runs: Outcomes.
        kind: `text_green` for text alone, `guard_green` for all that the run's guard measures.
    """
    lost = [run for run in runs if is_lost(run)]
    return sum(run[kind] for run in lost), len(lost)


def table(runs: list[dict[str, Any]]) -> str:
    """Return a Markdown table with one line per arm; numbers are medians over its runs."""
    header = ["arm", "runs", "English %", "own %", "Japanese gain %", "worst English"]
    header += [
        *FAMILIES,
        "accuracy lost",
        "text green",
        "false green (text)",
        "false green (own guard)",
    ]
    lines = [_row(header), "|" + "---|" * len(header)]
    for arm, group in by_arm(runs).items():
        cells = [arm, str(len(group))]
        for key in ("english_share", "own_share"):
            cells.append(f"{100 * statistics.median(run[key] for run in group):.1f}")
        cells.append(f"{statistics.median(map(japanese_gain, group)):.2f}")
        cells.append(f"{max(map(worst_english, group)):+.2f}")
        for family in FAMILIES:
            now = statistics.median(run["accuracy"][family]["now"] for run in group)
            cells.append(f"{100 * now:.1f}")
        cells.append(str(sum(map(is_lost, group))))
        cells.append(str(sum(run["text_green"] for run in group)))
        for kind in ("text_green", "guard_green"):
            cells.append(str(false_greens(group, kind)[0]))
        lines.append(_row(cells))
    return "\n".join(lines)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def by_arm(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the runs of each arm, in the order in which arms first appear."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        arms.setdefault(run["arm"], []).append(run)
    return arms


def against_yoked(runs: list[dict[str, Any]]) -> str:
    """Return a sentence on the Japanese gain of the new guard less that of its yoked control."""
    groups = by_arm(runs)
    differences = []
    for run in groups.get(STEERED, []):
        for control in groups.get(YOKED, []):
            if (run["base"], run["order"]) == (control["base"], control["order"]):
                differences.append(japanese_gain(run) - japanese_gain(control))
    if not differences:
        return "No pair of the new guard and its yoked control."
    mean = statistics.fmean(differences)
    text = f"Japanese gain, new guard less yoked: {mean:+.2f} points over {len(differences)} pairs"
    if len(differences) < 2:
        return f"{text}."
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    half = student_quantile(0.025, len(differences) - 1) * error
    return f"{text}, 95 % interval {mean - half:+.2f} to {mean + half:+.2f}."


@as_svg
def draw(runs: list[dict[str, Any]], source: str) -> Figure:
    """Draw each run as a point: right is more Japanese, up is more accuracy lost.

    Each base has a chart of its own. A filled point is a run whose guard was green in the end, a
    hollow one was amber or red.
    """
    bases = sorted({run["base"] for run in runs})
    title = "What Japanese gains, and what the tasks lose"
    width = 140 + 400 * len(bases)
    figure, charts = new_figure(width, 460, columns=len(bases), title=title, source=source)
    for base, axes in zip(bases, charts, strict=True):
        axes.set_title(f"base {base}")
        draw_level(axes, LOST_POINTS, ALARM, dash="dashed", label=f"lost: {LOST_POINTS:g} points")
        axes.set_xlabel("Japanese gain, % of the untouched model's bits per byte")
        axes.set_ylabel("fall of the worst family's accuracy, points")
        axes.margins(x=0.06)
        for index, group in enumerate(by_arm(runs).values()):
            color = PALETTE[index % len(PALETTE)]
            for run in group:
                if run["base"] == base:
                    fill = color if run["guard_green"] else "none"
                    axes.scatter(
                        japanese_gain(run), worst_fall(run), s=24, facecolors=fill, edgecolors=color
                    )
    for index, arm in enumerate(by_arm(runs)):
        charts[0].scatter([], [], s=24, color=PALETTE[index % len(PALETTE)], label=arm)
    for fill, label in ((MUTED, "its guard was green"), ("none", "amber or red")):
        charts[0].scatter([], [], s=24, facecolors=fill, edgecolors=MUTED, label=label)
    figure.legend(loc="outside right upper", frameon=False)
    return figure

"""The table and the plot of the guard's proof: what Japanese gained, what English paid."""

from __future__ import annotations

import statistics
from typing import TYPE_CHECKING, Any

from data_pipeline.charts import ALARM, INK, MUTED, PALETTE, as_svg, draw_level, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure

JAPANESE = "japanese"


def gain(run: dict[str, Any]) -> float:
    """Return the fall of bits per byte of Japanese, in percent of the untouched model's."""
    return -float(run["change_percent"][JAPANESE])


def english(run: dict[str, Any]) -> dict[str, float]:
    """Return the change of every other domain in percent; positive is worse."""
    return {
        domain: change for domain, change in run["change_percent"].items() if domain != JAPANESE
    }


def by_arm(runs: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """Return the runs of each arm, in the order in which arms first appear."""
    arms: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        arms.setdefault(run["arm"], []).append(run)
    return arms


def share_of_naive(runs: list[dict[str, Any]], run: dict[str, Any]) -> float:
    """Return the Japanese gain in percent of that of the naive run with the same order of data.

    It is NaN if there is no such run.
    """
    naive = [other for other in runs if other["arm"] == "naive" and other["seed"] == run["seed"]]
    return 100 * gain(run) / gain(naive[0]) if naive else float("nan")


def table(runs: list[dict[str, Any]]) -> str:
    """Return a Markdown table with one line per arm.

    Numbers are medians over seeds; the last column is the worst domain of any seed.
    """
    domains = list(english(runs[0]))
    header = ["arm", "seeds", "replay %", "Japanese gain %", "of naive %", *domains]
    header.append("worst domain of any seed")
    lines = [_markdown_row(header), "|" + "---|" * len(header)]
    for arm, group in by_arm(runs).items():
        replay = statistics.median(run["replay_share"] for run in group)
        gained = statistics.median(gain(run) for run in group)
        of_naive = statistics.median(share_of_naive(runs, run) for run in group)
        cells = [arm, str(len(group)), f"{100 * replay:.1f}", f"{gained:.2f}", f"{of_naive:.1f}"]
        for domain in domains:
            middle = statistics.median(english(run)[domain] for run in group)
            cells.append(f"{middle:+.2f}")
        worst = max(max(english(run).values()) for run in group)
        lines.append(_markdown_row([*cells, f"{worst:+.2f}"]))
    return "\n".join(lines)


def _markdown_row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


@as_svg
def draw(runs: list[dict[str, Any]], tolerance_percent: float, source: str) -> Figure:
    """Draw each run as a point and each arm in a color.

    Right is more Japanese, down is less English lost.
    """
    title = "What Japanese gains and English pays"
    figure, (axes,) = new_figure(720, 484, title=title, source=source)
    draw_level(axes, 0.0, MUTED)
    text = f"tolerance {tolerance_percent:+g} %"
    draw_level(axes, tolerance_percent, ALARM, dash="dashed", label=text)
    for index, (arm, group) in enumerate(by_arm(runs).items()):
        color = INK if arm == "guard" else PALETTE[index % len(PALETTE)]
        gains = [gain(run) for run in group]
        worst = [max(english(run).values()) for run in group]
        axes.scatter(gains, worst, s=18, color=color, marker="D" if arm == "guard" else "o")
        # beside the leftmost point of the arm, where no other arm's points lie
        left = gains.index(min(gains))
        axes.annotate(
            arm,
            (gains[left], worst[left]),
            xytext=(-7, 0),
            textcoords="offset points",
            ha="right",
            va="center",
        )
    axes.set_xlabel("Japanese gain, % of the untouched model's bits per byte")
    axes.set_ylabel("worst English domain, change in %")
    axes.margins(x=0.12)
    return figure

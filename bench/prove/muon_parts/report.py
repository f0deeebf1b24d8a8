"""The tables and the figure of the comparison: means over seeds with 95 % intervals."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mxfp4_parts.outcome import interval, markdown_table, rate_text

from data_pipeline.charts import PALETTE, Line, as_svg, draw_lines, new_figure
from muon_parts.cells import BASE, OPTIMIZERS

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Result = dict[str, Any]
TITLES = {"adamw": "AdamW", "muon": "Muon"}
DOMAINS = ("japanese", "english")


def in_a_line(result: Result) -> str:
    """Return a training's figures in a line."""
    scores = ", ".join(f"{name} {result['trained'][name]:.4f}" for name in DOMAINS)
    who = f"{result['base']}, {result['optimizer']}, seed {result['seed']}, lr {result['lr']:g}"
    return f"{who}: {scores} ({result['cpu_seconds']} s)"


def _rows(results: Sequence[Result], base: str) -> list[tuple[float, dict[str, list[Result]]]]:
    """Return the trainings from a base by rate and optimizer, of the seeds that have both."""
    rates = sorted({result["lr"] for result in results if result["base"] == base})
    found = []
    for lr in rates:
        by_optimizer: dict[str, list[Result]] = {name: [] for name in OPTIMIZERS}
        for result in results:
            if result["base"] == base and result["lr"] == lr:
                by_optimizer[result["optimizer"]].append(result)
        seeds = set.intersection(
            *({result["seed"] for result in group} for group in by_optimizer.values())
        )
        if not seeds:
            continue
        for name, group in by_optimizer.items():
            kept = [result for result in group if result["seed"] in seeds]
            by_optimizer[name] = sorted(kept, key=lambda result: int(result["seed"]))
        found.append((lr, by_optimizer))
    return found


def _cells(by_optimizer: dict[str, list[Result]], domain: str) -> list[str]:
    """Return the scores of both optimizers, and their difference seed by seed."""
    values = {}
    for name, group in by_optimizer.items():
        values[name] = [float(result["trained"][domain]) for result in group]
    differences = [b - a for a, b in zip(values["adamw"], values["muon"], strict=True)]
    texts = [interval(values[name]).text(".4f") for name in OPTIMIZERS]
    return [*texts, interval(differences).text("+.4f")]


HEADER = ["rate", "held-out", "seeds", "AdamW", "Muon", "Muon - AdamW"]


def base_table(results: Sequence[Result]) -> str:
    """Return the bits per byte at the end of the trainings from random weights."""
    lines = []
    for lr, by_optimizer in _rows(results, BASE):
        for domain in DOMAINS:
            count = str(len(by_optimizer["muon"]))
            cells = _cells(by_optimizer, domain)
            lines.append([rate_text(lr), domain, count, *cells])
    return markdown_table(HEADER, lines)


def continued_table(results: Sequence[Result]) -> str:
    """Return the bits per byte after the trainings on Japanese, by base."""
    lines = []
    for base in OPTIMIZERS:
        for lr, by_optimizer in _rows(results, base):
            for domain in DOMAINS:
                count = str(len(by_optimizer["muon"]))
                cells = _cells(by_optimizer, domain)
                lines.append([TITLES[base], rate_text(lr), domain, count, *cells])
    return markdown_table(["base", *HEADER], lines)


@as_svg
def draw(results: Sequence[Result], source: str) -> Figure:
    """Draw held-out English from random weights, and what training on Japanese makes of it.

    Args:
        results: The trainings.
        source: Small print: machine, versions, date.
    """
    title = "Muon and AdamW on a small gpt-oss, bits per byte of held-out text"
    figure, charts = new_figure(1080, 380, columns=3, title=title, source=source)
    curves, learned, forgotten = charts
    lines = []
    for index, (lr, by_optimizer) in enumerate(_rows(results, BASE)):
        for name, group in by_optimizer.items():
            lines.append(_curve(group, f"{TITLES[name]} {lr:g}", PALETTE[index], name))
    draw_lines(curves, lines, title="from random weights", x_label="steps", y_label="English")
    for axes, domain, heading in (
        (learned, "japanese", "after Japanese alone"),
        (forgotten, "english", "after Japanese alone"),
    ):
        rates = sorted({float(one["lr"]) for one in results if one["base"] != BASE})
        axes.set_xscale("log")
        axes.set_xticks(rates, [rate_text(rate) for rate in rates])
        axes.minorticks_off()
        lines = []
        for base, name in itertools.product(OPTIMIZERS, OPTIMIZERS):
            lines.append(_by_rate(results, base, name, domain))
        drawn = [line for line in lines if line.x]
        label = "learning rate on Japanese"
        draw_lines(axes, drawn, title=heading, x_label=label, y_label=domain.title())
    return figure


def _dash(optimizer: str) -> str:
    return "solid" if optimizer == "muon" else "dashed"


def _curve(group: Sequence[Result], label: str, color: str, optimizer: str) -> Line:
    """Return held-out English over the steps."""
    steps = [point["step"] for point in group[0]["curve"]]
    means, low, high = [], [], []
    for index in range(len(steps)):
        found = interval([result["curve"][index]["english"] for result in group])
        half = found.half if found.count > 1 else 0.0
        means.append(found.mean)
        low.append(found.mean - half)
        high.append(found.mean + half)
    dash = _dash(optimizer)
    return Line(label=label, x=steps, y=means, color=color, dash=dash, low=low, high=high)


def _by_rate(results: Sequence[Result], base: str, optimizer: str, domain: str) -> Line:
    """Return a held-out domain over the learning rates of the trainings from a base."""
    rates, means, low, high = [], [], [], []
    for lr, by_optimizer in _rows(results, base):
        found = interval([result["trained"][domain] for result in by_optimizer[optimizer]])
        half = found.half if found.count > 1 else 0.0
        rates.append(lr)
        means.append(found.mean)
        low.append(found.mean - half)
        high.append(found.mean + half)
    color = PALETTE[OPTIMIZERS.index(base)]
    return Line(
        label=f"{TITLES[optimizer]} after {TITLES[base]}",
        x=rates,
        y=means,
        color=color,
        dash=_dash(optimizer),
        low=low,
        high=high,
    )

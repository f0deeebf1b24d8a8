"""The scores of several checkpoints as a figure: one small chart for each task."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from cpt.errors import ConfigError
from cpt.offline.evaluation.scores import Result, Score, read_result
from data_pipeline.charts import (
    ALARM,
    PALETTE,
    Line,
    as_svg,
    draw_level,
    draw_lines,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS = 3
WIDTH = 340
HEIGHT = 220
"""Pixels of one chart."""
COLORS = {"en": PALETTE[0], "ja": PALETTE[1]}
"""Color by language; others are green."""
QUANTILE = 1.96
"""Standard errors from a score to the ends of its 95 % interval."""


def read_results(paths: Sequence[Path]) -> list[Result]:
    """Read the results of checkpoints, and return them by step.

    Raises:
        ConfigError: a file is no result, has no step, or has the step of another.
    """
    results = []
    problems = []
    steps: dict[int, Path] = {}
    for path in paths:
        result = read_result(path, "")
        if result.step is None:
            problems.append(f"{path}: has no step. Collect it again with --step.")
        elif result.step in steps:
            problems.append(f"{path}: is of step {result.step}, like {steps[result.step]}.")
        else:
            steps[result.step] = path
            results.append(result)
    if problems:
        raise ConfigError(problems)
    return sorted(results, key=_step)


def _step(result: Result) -> int:
    assert result.step is not None
    return result.step


@as_svg
def checkpoint_figure(results: Sequence[Result], baseline: Result | None) -> Figure:
    """Draw the scores over the steps, with 95 % intervals, and those before training as a level.

    Args:
        results: Results by step, from `read_results`.
        baseline: Result of the model before training, if there is one.
    """
    names: list[str] = []
    for result in results:
        names += [name for name in result.scores if name not in names]
    rows = math.ceil(len(names) / COLUMNS)
    figure, charts = new_figure(
        WIDTH * COLUMNS,
        HEIGHT * rows + 40,
        rows=rows,
        columns=COLUMNS,
        title="Scores by checkpoint",
        source="Bands: 95 % intervals of single scores. Dashed: before training. A change is "
        "judged pair by pair, and is surer than the bands.",
    )
    for chart, name in zip(charts, names, strict=False):
        scored = [result for result in results if name in result.scores]
        line = _line(scored, name)
        first = scored[0].scores[name]
        unit = "%" if first.counts_answers else "bits per byte"
        draw_lines(chart, [line], title=f"{name} ({first.language})", x_label="step", y_label=unit)
        if baseline is not None and name in baseline.scores:
            draw_level(chart, baseline.scores[name].value, ALARM, dash="dashed")
    for chart in charts[len(names) :]:
        chart.set_visible(False)
    return figure


def _line(results: Sequence[Result], name: str) -> Line:
    scores = [result.scores[name] for result in results]
    values = [score.value for score in scores]
    widths = [_half_width(score) for score in scores]
    color = COLORS.get(scores[0].language, PALETTE[2])
    last = f"{values[-1]:.1f}" if scores[0].counts_answers else f"{values[-1]:.3f}"
    return Line(
        label=last,
        x=[_step(result) for result in results],
        y=values,
        color=color,
        low=[value - width for value, width in zip(values, widths, strict=True)],
        high=[value + width for value, width in zip(values, widths, strict=True)],
    )


def _half_width(score: Score) -> float:
    """Return half of the 95 % interval of a score; 0 for bits per byte, compared only in pairs."""
    return QUANTILE * score.stderr if score.stderr is not None else 0.0

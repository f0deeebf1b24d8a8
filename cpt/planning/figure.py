"""The figure of a plan over many points: speed and cost of the best layouts over the GPUs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cpt.planning.estimate import Estimate
from cpt.planning.hardware import Assumptions, Gpu
from data_pipeline.charts import DASHES, PALETTE, Line, as_svg, draw_lines, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH = 1120
HEIGHT = 380


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedPoint:
    """One point of a plan over many."""

    model: str
    seq_len: int
    gpus: int
    best: Estimate | None
    """The fastest layout that fits; None if none does."""


@as_svg
def draw(points: Sequence[PlannedPoint], gpu: Gpu, assumed: Assumptions) -> Figure:
    """Draw tokens/s/GPU on the left, GPU-hours per billion tokens on the right."""
    source = (
        f"Computed, not measured: {gpu.name}, {assumed.computing_text()}, {assumed.routing_text()}"
    )
    figure, (left, right) = new_figure(WIDTH, HEIGHT, columns=2, source=source)
    gpus = sorted({point.gpus for point in points})
    for axes in (left, right):
        axes.set_xscale("log")
        axes.set_xticks(gpus, [f"{count:,}" for count in gpus])
        axes.minorticks_off()
    _draw_panel(left, points, "Speed of the best layout", "tokens/s/GPU", _speed)
    _draw_panel(right, points, "Cost of the best layout", "GPU-hours per 1e9 tokens", _cost)
    return figure


def _speed(best: Estimate) -> float:
    return best.tokens_per_gpu_second


def _cost(best: Estimate) -> float:
    return best.gpu_hours_per_billion_tokens


def _draw_panel(
    axes: Axes,
    points: Sequence[PlannedPoint],
    title: str,
    label: str,
    value: Callable[[Estimate], float],
) -> None:
    """Draw one line per model (the dash) and length of a row (the color)."""
    models = list(dict.fromkeys(point.model for point in points))
    seq_lens = list(dict.fromkeys(point.seq_len for point in points))
    series: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for point in points:
        if point.best is not None:
            drawn = series.setdefault((point.model, point.seq_len), [])
            drawn.append((point.gpus, value(point.best)))
    lines = []
    for (model, seq_len), values in series.items():
        gpus, heights = zip(*values, strict=True)
        lines.append(
            Line(
                label=f"{model.removeprefix('gpt-oss-')}, {seq_len:,}",
                x=gpus,
                y=heights,
                color=PALETTE[seq_lens.index(seq_len) % len(PALETTE)],
                dash=DASHES[models.index(model) % len(DASHES)],
            )
        )
    draw_lines(axes, lines, title=title, x_label="GPUs (log scale)", y_label=label, from_zero=True)

"""One chart over optimizer steps: a Bokeh figure in the style of the report.

All charts of a page share one step axis, so that zooming into one of them zooms into all.  Every
source of data keeps its steps in a column of `STEP_COLUMNS`, which the script of the page exchanges
for tokens when the reader asks for them.  Axis labels are fixed texts of this package: Bokeh would
load MathJax from the network for one that held TeX.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cpt.telemetry.report.series import Array, AxisRange, Series, log_ticks
from cpt.telemetry.report.theme import CARD
from data_pipeline.charts import ALARM, GRID, INK, MUTED

if TYPE_CHECKING:
    from bokeh.models import Range1d
    from bokeh.plotting import figure

MARKERS = ("triangle", "diamond", "square", "inverted_triangle", "star")
"""Bokeh's names of the shapes that tell actions apart."""
FONT = "system-ui, sans-serif"
STEP_LABEL = "optimizer step"
STEP_COLUMNS = ("x", "x0", "x1")
"""Columns of sources of data that hold steps; Bokeh names those of lines and of segments so."""
TOOLTIP_STYLE = {
    "display": "grid",
    "grid-template-columns": "auto auto",
    "gap": "1px 8px",
    "font": f"12px {FONT}",
}


class StepChart:
    """A frame with axes; every method draws on top of what is there."""

    def __init__(
        self,
        *,
        height: int,
        steps: Range1d,
        values: AxisRange,
        unit: str,
        title: str,
        step_label: str = STEP_LABEL,
        counts_tokens: bool = False,
    ) -> None:
        """Set up an empty frame.

        Args:
            height: In pixels; the width is that of the place on the page.
            steps: The step axis that all charts of the page share.
            values: Range of the vertical axis.
            unit: Label of the vertical axis.
            title: Description for those who cannot see the chart.
            step_label: Label of the horizontal axis.
            counts_tokens: The horizontal axis counts tokens, so that lines share no points;
                tooltips tell the value of each at the place of the pointer.
        """
        from bokeh.models import Range1d
        from bokeh.plotting import figure

        self.title = title
        self.steps = steps
        self.values = values
        self._counts_tokens = counts_tokens
        self._told: dict[str, Series] = {}
        self.figure: figure = figure(
            height=height,
            sizing_mode="stretch_width",
            x_range=steps,
            y_range=Range1d(start=values.low, end=values.high),
            y_axis_type="log" if values.log else "linear",
            x_axis_label=step_label,
            y_axis_label=f"{unit}, log scale" if values.log else unit,
            tools="xpan,xbox_zoom,reset,save",
            active_drag="xbox_zoom",
            min_border=4,
            min_border_right=22,
            outline_line_color=None,
            background_fill_color=None,
            border_fill_color=None,
            styles={"background-color": "var(--card)"},
        )
        self._style(max(2, height // 45))

    def line(
        self, name: str, series: Series, color: str, *, dash: str = "solid", width: float = 1.6
    ) -> None:
        """Draw a line through the means, with the range of each bin as a band behind it."""
        if len(series) == 0:
            return
        if np.any(series.high > series.low):
            self.band(series, color)
        self.curve(name, series, color, dash=dash, width=width)

    def curve(
        self,
        name: str,
        series: Series,
        color: str,
        *,
        dash: str = "solid",
        width: float = 1.6,
        dots: bool = False,
    ) -> None:
        """Draw a line through the means, without a band."""
        source = {"x": series.x, "y": series.mean}
        self.figure.line("x", "y", source=source, color=color, line_dash=dash, line_width=width)
        if dots or len(series) == 1:
            self.figure.scatter("x", "y", source=source, color=color, size=5)
        self._told[name] = series

    def band(self, series: Series, color: str, *, opacity: float = 0.16) -> None:
        """Fill the surface between the lowest and the highest values."""
        self.figure.varea(series.x, series.low, series.high, fill_color=color, fill_alpha=opacity)

    def stacked_area(self, name: str, x: Array, low: Array, high: Array, color: str) -> None:
        """Fill the surface between two curves, with a thin line on top."""
        self.figure.varea(x, low, high, fill_color=color)
        self.figure.line(x, high, color=CARD, line_width=0.7)
        share = high - low
        self._told[name] = Series(x=x, mean=share, low=share, high=share)

    def whiskers(self, series: Series, color: str) -> None:
        """Draw the interval of every point as a vertical bar."""
        self.figure.segment(
            series.x, series.low, series.x, series.high, color=color, line_width=1.2
        )
        ends = np.concatenate([series.low, series.high])
        at = np.concatenate([series.x, series.x])
        self.figure.scatter(at, ends, marker="dash", color=color, size=7, line_width=1.2)

    def level(self, value: float, color: str, *, dash: str = "dashed", label: str = "") -> None:
        """Draw a level across the whole chart, with a label at its right end."""
        from bokeh.models.annotations import Label, Span

        span = Span(location=value, dimension="width", line_color=color, line_dash=dash)
        self.figure.add_layout(span)
        if label:
            end: Any = self.steps.end
            text = Label(
                x=end,
                y=value,
                text=label,
                text_align="right",
                text_color=color,
                text_font=FONT,
                text_font_size="11px",
                y_offset=2,
            )
            self.figure.add_layout(text)

    def verticals(self, steps: Sequence[int], *, dash: str = "dotted") -> None:
        """Draw lines from top to bottom where something happened to the whole run."""
        from bokeh.models.annotations import Span

        for step in steps:
            span = Span(
                location=step,
                dimension="height",
                level="underlay",
                line_color=MUTED,
                line_dash=dash,
            )
            self.figure.add_layout(span)

    def marks(
        self, steps: Sequence[int], marker: str, texts: Sequence[str], color: str = ALARM
    ) -> None:
        """Draw one mark for each step along the upper edge; hovering over it tells its text."""
        from bokeh.models import HoverTool

        top = self.values.high - 0.04 * (self.values.high - self.values.low)
        data = {"x": list(steps), "y": [top] * len(steps), "text": list(texts)}
        drawn = self.figure.scatter(
            "x",
            "y",
            source=data,
            marker=marker,
            size=9,
            fill_color=color,
            line_color=CARD,
            line_width=0.8,
        )
        self.figure.add_tools(HoverTool(renderers=[drawn], tooltips="@text", visible=False))

    def squares(self, steps: Sequence[int], colors: Sequence[str], texts: Sequence[str]) -> None:
        """Draw one square for each step along the lower edge; hovering over it tells its text."""
        from bokeh.models import HoverTool

        bottom = self.values.low + 0.03 * (self.values.high - self.values.low)
        data = {
            "x": list(steps),
            "y": [bottom] * len(steps),
            "color": list(colors),
            "text": list(texts),
        }
        drawn = self.figure.scatter(
            "x",
            "y",
            source=data,
            marker="square",
            size=6,
            fill_color="color",
            line_color=CARD,
            line_width=0.6,
        )
        self.figure.add_tools(HoverTool(renderers=[drawn], tooltips="@text", visible=False))

    def add_tooltips(self) -> None:
        """Tell the values of everything that was drawn at the step below the pointer."""
        from bokeh.models import HoverTool

        if not any(map(len, self._told.values())):
            return
        x = np.unique(np.concatenate([series.x for series in self._told.values()]))
        middle = (self.values.low + self.values.high) / 2
        source: dict[str, Any] = {"x": x, "y": np.full(len(x), middle), "step": _step_texts(x)}
        rows = [("step", "step")]
        texts_at = _texts_at
        if self._counts_tokens:
            source["step"] = [f"{tokens:.4g}" for tokens in x]
            rows = [("tokens", "step")]
            texts_at = _texts_between
        for index, (name, series) in enumerate(self._told.items()):
            source[f"text{index}"] = texts_at(x, series)
            rows.append((name, f"text{index}"))
        # one invisible line for all: each line of its own would open a tooltip of its own
        invisible = self.figure.line("x", "y", source=source, line_alpha=0)
        self.figure.add_tools(
            HoverTool(
                renderers=[invisible],
                tooltips=_tooltip(rows),
                mode="vline",
                visible=False,
            )
        )

    def _style(self, num_value_ticks: int) -> None:
        from bokeh.models import BasicTicker, FixedTicker, NumeralTickFormatter

        chart = self.figure
        chart.toolbar.logo = None
        chart.toolbar.autohide = True
        chart.toolbar_inner = True
        for axis in (chart.xaxis, chart.yaxis):
            axis.axis_label_text_font = FONT
            axis.axis_label_text_font_size = "11px"
            axis.axis_label_text_font_style = "normal"
            axis.axis_label_text_color = MUTED
            axis.major_label_text_font = FONT
            axis.major_label_text_font_size = "11px"
            axis.major_label_text_color = INK
            axis.axis_line_color = MUTED
            axis.major_tick_line_color = MUTED
            axis.major_tick_in = 0
            axis.minor_tick_line_color = None
            axis.axis_label_standoff = 3
        # the script of the page fits their number to the width; there is no half step
        least = 0.0 if self._counts_tokens else 1.0
        chart.xaxis.ticker = BasicTicker(desired_num_ticks=6, min_interval=least)
        chart.yaxis.ticker = BasicTicker(desired_num_ticks=num_value_ticks)
        if self.values.log:
            ticks = log_ticks(self.values.low, self.values.high, num_value_ticks + 2)
            chart.yaxis.ticker = FixedTicker(ticks=ticks)
        step_format = "0,0.[00]" if self._counts_tokens else "0,0"
        chart.xaxis.formatter = NumeralTickFormatter(format=step_format)
        chart.yaxis.axis_line_color = None
        chart.yaxis.major_tick_line_color = None
        chart.yaxis.formatter = _value_format(self.values)
        chart.xgrid.grid_line_color = None
        chart.ygrid.grid_line_color = GRID


def _tooltip(rows: Sequence[tuple[str, str]]) -> Any:
    """Return a table of names and of the columns that hold their texts.

    It is built of nodes, not of HTML: a name cannot become a tag.
    """
    from bokeh.models.dom import Div, Span, Text, ValueRef

    cells: list[Any] = []
    for name, column in rows:
        cells.append(Span(style={"color": MUTED}, children=[Text(content=name)]))
        cells.append(Span(style={"color": INK}, children=[ValueRef(field=column)]))
    return Div(style=TOOLTIP_STYLE, children=cells)


def _step_texts(x: Array) -> list[str]:
    """Return steps for people; a bin of several steps has its mean."""
    return [f"{step:,.0f}" for step in x]


def _texts_at(x: Array, series: Series) -> list[str]:
    """Return the value of a series at each x with its range; empty where it has none."""
    texts = [""] * len(x)
    for at, mean, low, high in zip(series.x, series.mean, series.low, series.high, strict=True):
        text = f"{mean:.4g}"
        if high > low:
            text += f" ({low:.4g} to {high:.4g})"
        texts[int(np.searchsorted(x, at))] = text
    return texts


def _texts_between(x: Array, series: Series) -> list[str]:
    """Return the value of a series at each x, between its points; empty outside of it."""
    values = np.interp(x, series.x, series.mean, left=np.nan, right=np.nan)
    return [f"{value:.4g}" if np.isfinite(value) else "" for value in values]


def _value_format(values: AxisRange) -> Any:
    """Return the tick notation that suits an axis: 2e-5, 0.25, 40k."""
    from bokeh.models import BasicTickFormatter, NumeralTickFormatter

    largest = max(abs(values.low), abs(values.high))
    if largest >= 10_000:
        return NumeralTickFormatter(format="0.[0]a")
    if largest < 0.01:
        return BasicTickFormatter(precision=1)
    return BasicTickFormatter()

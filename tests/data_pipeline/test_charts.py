"""Figures are well-formed SVG, the same bytes each time, and their labels can be read."""

from __future__ import annotations

import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from typing import Any

import numpy as np
import pytest

from data_pipeline.charts import (
    PALETTE,
    Bar,
    Line,
    as_svg,
    draw_bars,
    draw_columns,
    draw_lines,
    inline,
    new_figure,
    spread,
)

JAPANESE = "\u65e5\u672c\u8a9e"


@as_svg
def sample(name: str) -> Any:
    figure, (top, middle, bottom) = new_figure(400, 500, rows=3, title=name, source=name)
    draw_lines(
        top,
        [Line(label=name, x=[0, 1, 2], y=[1.0, 4.0, 2.0], color=PALETTE[0])],
        x_label="step",
        y_label="epochs",
    )
    draw_bars(middle, name, [Bar(name, 0.5, "50 %", 0.25), Bar("empty", 0.0, "0 %", alarm=True)])
    draw_columns(bottom, name, [1, 0, 3, 2], ["1", "2", "4", "8"])
    return figure


@pytest.mark.parametrize("name", ["plain", '<b>&"', "$x_1$ \\frac $", JAPANESE])
def test_text_is_shown_as_it_is(name: str, recwarn: pytest.WarningsRecorder) -> None:
    root = ET.fromstring(sample(name))
    texts = [
        "".join(element.itertext()).strip() for element in root.iter() if "text" in element.tag
    ]
    assert texts.count(name) >= 5
    assert not recwarn.list


def test_same_figure_gives_the_same_bytes() -> None:
    assert sample("twice") == sample("twice")


def test_figure_refers_to_nothing_outside_itself() -> None:
    text = inline(sample("name"))
    assert text.startswith("<svg")
    references = re.findall(r'href="(.*?)"|url\((.*?)\)', text)
    assert all(target.startswith("#") for pair in references for target in pair if target)


def test_charts_without_content_are_drawn() -> None:
    @as_svg
    def empty() -> Any:
        figure, (above, below) = new_figure(300, 300, rows=2)
        draw_bars(above, "nothing", [])
        draw_columns(below, "nothing", [0, 0], ["1", "2"])
        return figure

    ET.fromstring(empty())


def test_labels_beside_a_plot_do_not_cover_each_other() -> None:
    heights = [50.0 - n / 10 for n in range(12)]
    placed = spread(heights, gap=13.0, lowest=10.0)
    assert min(-np.diff(placed)) >= 13.0 and min(placed) >= 10.0
    assert spread([90.0, 50.0, 20.0], gap=13.0, lowest=0.0) == [90.0, 50.0, 20.0]


def test_library_is_imported_only_where_something_is_drawn() -> None:
    code = "import data_pipeline.__main__, sys; print('matplotlib' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "False"

"""report.html: one run on one page, from its run directory, while it runs and afterwards.

The page holds everything it shows, the drawing library (BokehJS) included, and its content security
policy forbids the browser to fetch anything.  Every name in it comes from a file and is escaped by
the template.  Stages:

    run directory -> overview (its state), history (columns over steps)
                  -> state card, tiles and panels (data) -> page.html.jinja
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cpt.errors import ConfigError, StorageError
from cpt.telemetry.report.chart import STEP_COLUMNS, STEP_LABEL
from cpt.telemetry.report.generation_panel import generation_panel
from cpt.telemetry.report.guard_panel import domain_grid, guard_panel
from cpt.telemetry.report.history import Run, read_run
from cpt.telemetry.report.layout import around_mixture, beside, mixture_height
from cpt.telemetry.report.mixture_panel import mixture_panel
from cpt.telemetry.report.panel import Panel, clean, language_colors, moment, plural
from cpt.telemetry.report.panels import (
    divergence_panel,
    loss_panel,
    memory_panel,
    norm_panel,
    rate_panel,
    starts_panel,
    throughput_panel,
    time_panel,
    traffic_panel,
    utilization_panel,
)
from cpt.telemetry.report.router_panel import router_panel
from cpt.telemetry.report.series import step_range
from cpt.telemetry.report.starts import MAX_MARKS
from cpt.telemetry.report.state_card import actions_panel, standing_panel, state_card
from cpt.telemetry.report.theme import counterparts, css_variables, dark_of
from cpt.telemetry.report.tiles import tiles
from cpt.telemetry.report.token_axis import token_axis
from cpt.telemetry.report.trace_panel import trace_panel
from cpt.telemetry.run_overview import METRICS, RunOverview, RunState, run_overview
from data_pipeline.charts import MUTED
from data_pipeline.escaping import escaped_text
from data_pipeline.store.files import write_text

if TYPE_CHECKING:
    from jinja2 import Environment
    from markupsafe import Markup

FOLDER = Path(__file__).parent
GLYPHS = {
    "triangle": "\N{BLACK UP-POINTING TRIANGLE}",
    "diamond": "\N{BLACK DIAMOND}",
    "square": "\N{BLACK SQUARE}",
    "inverted_triangle": "\N{BLACK DOWN-POINTING TRIANGLE}",
    "star": "\N{BLACK STAR}",
}
"""The shapes of `chart.MARKERS` in the legend."""
MARK_DASHES = {"start": "dotted", "rollback": "dashed", "stage": "solid"}
"""Style of the line across all charts by kind of `starts.Mark`."""


def write_report(run_dir: Path, *, leaving: RunState | None = None, cause: str = "") -> Path:
    """Write <run_dir>/report.html from the files of the run, in place of an older one.

    Args:
        run_dir: The run directory.
        leaving: State in which this process is about to leave a directory that it still holds; None
            for a run of another process, whose state is looked up.
        cause: Why it leaves, in one line.

    Raises:
        ConfigError: the directory holds no metrics.jsonl.
        StorageError: the page cannot be written.
    """
    metrics = run_dir / METRICS
    if not metrics.is_file():
        raise ConfigError(
            f"{run_dir} holds no {METRICS}, so it is no run directory. Give another with --run_dir."
        )
    overview = run_overview(run_dir)
    if leaving is not None:
        overview = replace(overview, state=leaving, cause=cause, eta_seconds=math.nan)
    text = render_report(overview, read_run(run_dir))
    target = run_dir / "report.html"
    try:
        write_text(target, text)
    except OSError as error:
        raise StorageError(
            f"{target}: {error.strerror}. Free space or make the directory writable."
        ) from error
    return target


def render_report(overview: RunOverview, run: Run) -> str:
    """Return the whole document.

    Args:
        overview: State of the run.
        run: Its log.
    """
    panels = all_panels(run, overview)
    drawn = draw_charts(panels)
    return (
        environment()
        .get_template("page.html.jinja")
        .render(
            name=clean(overview.name, 60),
            subtitle=clean(subtitle(run), 200),
            state=state_card(overview),
            last_sign=moment(overview.last_sign),
            written=moment(time.time()),
            notes=[clean(note, 200) for note in run.notes],
            has_starts=any(mark.kind == "start" for mark in run.marks),
            has_rollbacks=any(mark.kind == "rollback" for mark in run.marks),
            has_stages=any(mark.kind == "stage" for mark in run.marks),
            tiles=tiles(run, overview),
            panels=panels,
            drawn=drawn,
            facts=page_facts(drawn, token_axis(run)),
            **page_parts(),
        )
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class DrawnCharts:
    """All charts of a page, for its template."""

    script: Markup
    """Draws them; empty if there are none."""
    places: dict[str, Markup]
    """Element of each chart by the id of its figure."""


def draw_charts(panels: Iterable[Panel]) -> DrawnCharts:
    """Return the charts of panels as one script and one element each."""
    from bokeh.document import Document
    from bokeh.embed import components
    from markupsafe import Markup

    figures: dict[str, Any] = {}
    document = Document()
    for panel in panels:
        for cell in panel.cells:
            cell.chart.add_tooltips()
            figures[cell.chart.figure.id] = cell.chart.figure
    # the charts share their step axis: without this each one added would be searched again
    with document.models.freeze():
        for figure in figures.values():
            document.add_root(figure)
    script, places = components(figures) if figures else ("", {})
    return DrawnCharts(
        script=Markup(script),
        places={key: Markup(place) for key, place in places.items()},
    )


def page_facts(drawn: DrawnCharts, axis: dict[str, Any] | None) -> dict[str, Any]:
    """Return what the script of a page must know: dark colors, and tokens by step."""
    return {
        "dark": counterparts([drawn.script]),
        "axis": axis,
        "columns": list(STEP_COLUMNS),
        "labels": [STEP_LABEL, "step"],
    }


def page_parts() -> dict[str, Any]:
    """Return what every page with charts has in common: its style and scripts."""
    from bokeh.resources import Resources
    from markupsafe import Markup

    library = Resources(mode="inline", components=["bokeh"]).js_raw
    return {
        "style": Markup(css_variables() + _own_text("page.css")),
        "library": Markup("\n".join(library)),
        "page_script": Markup(_own_text("page.js")),
    }


def environment() -> Environment:
    """Return the templates of this folder; every text that they show is escaped."""
    from jinja2 import Environment, FileSystemLoader

    templates = Environment(autoescape=True, finalize=shown_value, loader=FileSystemLoader(FOLDER))
    templates.globals.update(dark_of=dark_of, glyphs=GLYPHS, mark_color=MUTED)
    templates.tests["moment"] = lambda value: isinstance(value, datetime)
    return templates


def shown_value(value: object) -> object:
    """Return what a template shows for a value: a text with nothing hidden in it."""
    # markup is a subclass of str, and this project's own
    return escaped_text(value) if type(value) is str else value


def _own_text(name: str) -> str:
    return (FOLDER / name).read_text(encoding="utf-8")


def all_panels(run: Run, overview: RunOverview) -> list[Panel]:
    """Return the panels in the order in which they stand on the page."""
    from bokeh.models import Range1d

    colors = language_colors(run)
    of_guard = (*run.guard_events, *run.generation_events, *run.trace_events)
    measured = [event["step"] for event in of_guard]
    shown = step_range(np.append(run.steps, measured))
    steps = Range1d(start=shown.low, end=shown.high)
    num_guard_rows = max(2, domain_grid(run)[1])
    small = _present(
        rate_panel(run, steps),
        norm_panel(run, steps),
        throughput_panel(run, steps),
        utilization_panel(run, steps),
        memory_panel(run, steps),
        traffic_panel(run, steps),
    )
    mixture = mixture_panel(run, steps, colors, mixture_height(len(small)))
    loss = loss_panel(run, steps, colors, height=318 + 158 * (num_guard_rows - 2))
    panels = [
        *beside(standing_panel(overview), actions_panel(overview)),
        *_present(time_panel(run)),
        *beside(loss, guard_panel(run, steps, colors)),
        *_present(trace_panel(run, steps, colors)),
        *around_mixture(mixture, small),
        *_present(
            divergence_panel(run, steps, colors),
            generation_panel(run, steps),
            router_panel(run, steps, colors),
            starts_panel(run),
        ),
    ]
    _mark_starts(run, panels)
    return panels


def _present(*panels: Panel | None) -> list[Panel]:
    """Return the panels whose subject the run has measured."""
    return [panel for panel in panels if panel is not None]


def _mark_starts(run: Run, panels: Sequence[Panel]) -> None:
    """Draw lines across all charts where the run was started again or went back."""
    for panel in panels:
        for cell in panel.cells:
            for kind, dash in MARK_DASHES.items():
                steps = [mark.step for mark in run.marks if mark.kind == kind]
                cell.chart.verticals(steps[-MAX_MARKS:], dash=dash)


def subtitle(run: Run) -> str:
    """Return what was trained, and on how many ranks."""
    config = run.config
    parts = [
        run.setting("model", "path") or run.setting("model", "init"),
        run.setting("train", "dtype"),
    ]
    world_size = config.get("world_size")
    if isinstance(world_size, int):
        parts.append(plural(world_size, "rank"))
    if config.get("sp_size", 1) != 1:
        parts.append(f"sequence parallel {config['sp_size']}")
    if config.get("ep_size", 1) != 1:
        parts.append(f"expert parallel {config['ep_size']}")
    rows = run.setting("train", "global_batch_size")
    seq_len = run.setting("train", "seq_len")
    if rows and seq_len:
        parts.append(f"{rows} rows of {seq_len} tokens per step")
    return " | ".join(str(part) for part in parts if part)

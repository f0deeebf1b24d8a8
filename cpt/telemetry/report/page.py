"""report.html: one run on one screen, from metrics.jsonl and config.resolved.yaml.

The page holds everything it shows, the drawing library (BokehJS) included, and its content security
policy forbids the browser to fetch anything.  Every name in it comes from a file and is escaped by
the template.  Stages:

    metrics.jsonl -> history (columns over steps) -> tiles and panels (data) -> page.html.jinja
"""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from cpt.errors import ConfigError, StorageError
from cpt.telemetry.report.generation_panel import generation_panel
from cpt.telemetry.report.guard_panel import domain_grid, guard_panel
from cpt.telemetry.report.history import Run, read_run
from cpt.telemetry.report.mixture_panel import mixture_panel
from cpt.telemetry.report.panel import Panel, clean, language_colors, plural
from cpt.telemetry.report.panels import (
    divergence_panel,
    loss_panel,
    norm_panel,
    rate_panel,
    throughput_panel,
    time_panel,
    traffic_panel,
)
from cpt.telemetry.report.router_panel import router_panel
from cpt.telemetry.report.series import step_range
from cpt.telemetry.report.tiles import tiles
from cpt.telemetry.report.trace_panel import trace_panel
from data_pipeline.store.files import write_text

TEMPLATE = Path(__file__).with_name("page.html.jinja")
GLYPHS = {
    "triangle": "\N{BLACK UP-POINTING TRIANGLE}",
    "diamond": "\N{BLACK DIAMOND}",
    "square": "\N{BLACK SQUARE}",
    "inverted_triangle": "\N{BLACK DOWN-POINTING TRIANGLE}",
    "star": "\N{BLACK STAR}",
}
"""The shapes of `chart.MARKERS` in the legend."""


def write_report(run_dir: Path) -> Path:
    """Write <run_dir>/report.html from the metrics of the run, in place of an older one.

    Raises:
        ConfigError: the directory holds no metrics.jsonl.
        StorageError: the page cannot be written.
    """
    metrics = run_dir / "metrics.jsonl"
    if not metrics.is_file():
        raise ConfigError(
            f"{run_dir} holds no metrics.jsonl, so it is no run directory. "
            "Give another with --run_dir."
        )
    written = datetime.fromtimestamp(metrics.stat().st_mtime, UTC)
    text = page(
        read_run(run_dir), run_dir.resolve().name, f"metrics up to {written:%Y-%m-%d %H:%M} UTC"
    )
    target = run_dir / "report.html"
    try:
        write_text(target, text)
    except OSError as error:
        raise StorageError(
            f"{target}: {error.strerror}. Free space or make the directory writable."
        ) from error
    return target


def page(run: Run, name: str, freshness: str) -> str:
    """Return the whole document."""
    from bokeh.document import Document
    from bokeh.embed import components
    from bokeh.resources import Resources
    from jinja2 import Environment
    from markupsafe import Markup

    panels = all_panels(run)
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
    library = Resources(mode="inline", components=["bokeh"]).js_raw
    # trailing whitespace is cut from lines of the template, not from what is put into them
    template = Environment(autoescape=True).from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        name=clean(name, 60),
        subtitle=clean(subtitle(run), 200),
        freshness=freshness,
        notes=[clean(note, 200) for note in run.notes],
        tiles=tiles(run),
        panels=panels,
        glyphs=GLYPHS,
        library=Markup("\n".join(library)),
        script=Markup(script),
        places={key: Markup(place) for key, place in places.items()},
    )


def all_panels(run: Run) -> list[Panel]:
    """Return the panels in the order in which they stand on the page."""
    from bokeh.models import Range1d

    colors = language_colors(run)
    of_guard = (*run.guard_events, *run.generation_events, *run.trace_events)
    measured = [event["step"] for event in of_guard]
    shown = step_range(np.append(run.steps, measured))
    steps = Range1d(start=shown.low, end=shown.high)
    num_guard_rows = max(2, domain_grid(run)[1])
    panels = [
        time_panel(run),
        loss_panel(run, steps, colors, height=318 + 158 * (num_guard_rows - 2)),
        guard_panel(run, steps, colors),
        trace_panel(run, steps, colors),
        mixture_panel(run, steps, colors),
        rate_panel(run, steps),
        norm_panel(run, steps),
        throughput_panel(run, steps),
        traffic_panel(run, steps),
        divergence_panel(run, steps, colors),
        generation_panel(run, steps),
        router_panel(run, steps, colors),
    ]
    # None: the run has not measured what the panel would show
    return [panel for panel in panels if panel is not None]


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

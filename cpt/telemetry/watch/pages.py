"""The pages of `cpt watch` as HTML; every text that comes from a file is escaped."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote, urlencode

from cpt.telemetry.report.comparison import AXES, Axis, render_comparison
from cpt.telemetry.report.history import read_run
from cpt.telemetry.report.page import render_report, shown_value
from cpt.telemetry.report.panel import clean
from cpt.telemetry.report.theme import css_variables
from cpt.telemetry.run_end import METRICS
from cpt.telemetry.watch.board import Board, ListedRun
from cpt.telemetry.watch.rows import row_of

if TYPE_CHECKING:
    from jinja2 import Environment

FOLDER = Path(__file__).parent
REPORT_FOLDER = FOLDER.parent / "report"


class Pages:
    """The templates and style sheets."""

    def __init__(self) -> None:
        self._templates = _templates()

    def index(self, board: Board, interval_seconds: float) -> str:
        """Return the page with all runs."""
        return self._render(
            "index.html.jinja",
            root=clean(board.root.resolve().name, 60),
            interval=f"{interval_seconds:g}",
            **_listed(board),
        )

    def rows(self, board: Board) -> str:
        """Return the rows of that page."""
        return self._render("tbody.html.jinja", **_listed(board))

    def run(self, run: ListedRun, version: str, interval_seconds: float) -> str:
        """Return the page of a run, which frames its report."""
        link = quote(run.key, safe="/")
        query = urlencode({"run": run.key})
        return self._render(
            "frame.html.jinja",
            title=clean(run.key, 80),
            source=f"/report/{link}",
            version_source=f"/version?{query}",
            version=version,
            interval=f"{interval_seconds:g}",
            links=[("JSON", f"/api/run/{link}")],
        )

    def comparing(
        self, runs: Sequence[ListedRun], axis: Axis, version: str, interval_seconds: float
    ) -> str:
        """Return the page that frames a comparison."""
        query = urlencode([("run", run.key) for run in runs])
        links = [(f"over {name}", f"/compare?{query}&axis={name}") for name in AXES if name != axis]
        return self._render(
            "frame.html.jinja",
            title=clean(" / ".join(run.key for run in runs), 160),
            source=f"/comparison?{query}&axis={axis}",
            version_source=f"/version?{query}&axis={axis}",
            version=version,
            interval=f"{interval_seconds:g}",
            links=links,
        )

    def report(self, run: ListedRun) -> str:
        """Return the report of a run, drawn from its files now."""
        if run.is_closed:
            return self._without_charts(run, _closed_text(run))
        if not (run.run_dir / METRICS).is_file():
            text = "This run has logged nothing yet. The page fills by itself."
            return self._without_charts(run, text)
        return render_report(run.overview, read_run(run.run_dir))

    def comparison(self, runs: Sequence[ListedRun], axis: Axis) -> str:
        """Return runs laid over each other, drawn from their files now."""
        for run in runs:
            if run.is_closed:
                return self._without_charts(run, _closed_text(run))
        named = {run.key: (run.overview, read_run(run.run_dir)) for run in runs}
        return render_comparison(named, axis)

    def _without_charts(self, run: ListedRun, text: str) -> str:
        """Return the page of a run that has nothing to draw."""
        title = clean(run.key, 80)
        return self._render("empty.html.jinja", title=title, text=text, style=_report_style())

    def _render(self, name: str, **values: object) -> str:
        return self._templates.get_template(name).render(**values)


def _closed_text(run: ListedRun) -> str:
    return f"This run is not read: {clean(run.overview.cause, 200)}."


@cache
def static_file(name: str) -> tuple[str, str]:
    """Return content type and text of one of `watch.css` and `watch.js`."""
    own = (FOLDER / name).read_text(encoding="utf-8")
    if name == "watch.css":
        return "text/css", _report_style() + own
    return "text/javascript", own


@cache
def _report_style() -> str:
    return css_variables() + (REPORT_FOLDER / "page.css").read_text(encoding="utf-8")


def _templates() -> Environment:
    from jinja2 import Environment, FileSystemLoader

    return Environment(autoescape=True, finalize=shown_value, loader=FileSystemLoader(FOLDER))


def _listed(board: Board) -> dict[str, object]:
    """Return what the rows show."""
    runs = board.runs()
    now = time.time()
    counts = Counter(run.overview.state for run in runs)
    return {
        "rows": [row_of(run, now) for run in runs],
        "counts": ", ".join(f"{count} {state}" for state, count in counts.most_common()),
        "problem": clean(board.problem, 200),
    }

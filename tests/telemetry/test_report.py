"""The report is one self-contained page, true to the log, for runs of any length and with anything
in their files.
"""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import replace
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytest
from bokeh.models import ColumnDataSource, Range1d
from bokeh.models.annotations import Span
from bokeh.resources import Resources

from cpt.errors import ConfigError, StorageError
from cpt.telemetry.report.chart import StepChart
from cpt.telemetry.report.history import current_branch, read_run
from cpt.telemetry.report.layout import around_mixture, beside
from cpt.telemetry.report.page import all_panels, render_report, write_report
from cpt.telemetry.report.panel import Panel, clean, duration, source_languages
from cpt.telemetry.report.series import (
    MAX_POINTS,
    AxisRange,
    bin_series,
    bin_starts,
    log_ticks,
    range_over,
    step_range,
)
from cpt.telemetry.report.starts import marks
from cpt.telemetry.report.theme import (
    CARD,
    COUNTERPARTS,
    DARK,
    LIGHT,
    SURFACES,
    TEXTS,
    contrast,
    counterparts,
    dark_of,
)
from cpt.telemetry.report.token_axis import token_axis
from cpt.telemetry.run_overview import RunState, run_overview
from data_pipeline.charts import GRID, PALETTE
from tests.support.run_events import (
    CONFIG,
    checkpoint,
    end,
    guard,
    long_run,
    router,
    run_dir,
    start,
    step,
    traces,
)

HOSTILE = "<script>alert(1)</script>&\"'\u202e\ud800"


def page(tmp_path: Path, *events: dict[str, Any], config: str | None = CONFIG) -> str:
    return write_report(run_dir(tmp_path, *events, config=config)).read_text(encoding="utf-8")


def tiles(text: str) -> dict[str, str]:
    return dict(re.findall(r'<dt>(.*?)</dt><dd class="value">(.*?)</dd>', text))


@cache
def library() -> str:
    """The script of the drawing library, as it stands in every page."""
    return "\n".join(Resources(mode="inline", components=["bokeh"]).js_raw)


def charts(folder: Path) -> list[StepChart]:
    """All charts of the report of a run."""
    panels = all_panels(read_run(folder), run_overview(folder))
    return [cell.chart for panel in panels for cell in panel.cells]


def columns(chart: StepChart) -> list[list[Any]]:
    """All columns of numbers or texts that a chart draws from."""
    sources = chart.figure.select({"type": ColumnDataSource})
    return [list(column) for source in sources for column in source.data.values()]


class Tags(HTMLParser):
    """Remembers every tag and attribute name of a page, and that tags are closed in order."""

    VOID = ("meta", "br", "input")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[str] = set()
        self._open: list[str] = []
        self.feed(text)
        assert not self._open, self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag not in self.VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag


SHAPES: dict[str, list[dict[str, Any]]] = {
    "empty": [],
    "traces": [traces(n, d) for n in range(0, 40, 10) for d in ("en-math", "ja-math")],
    "many looks at traces": [traces(n) for n in range(1, 60)],
    "traces that are no numbers": [
        traces(1),
        traces(2, divergence=None, control_divergence=None, delta=None, lower_bound=None),
    ],
    "baseline only": [guard(0)],
    "one step": [step(1)],
    "one step and its guard": [guard(0), step(1), guard(1)],
    "no guard": [step(n) for n in range(1, 31)],
    "long": long_run(),
    "constant": [step(n, loss=0.0, grad_norm=0.0, lr=0.0) for n in range(1, 5)],
    "not finite": [
        step(n, loss=math.nan, grad_norm=None, lr="x", loss_by_language=None) for n in range(1, 5)
    ],
    "bare steps": [{"event": "step", "step": n} for n in range(1, 5)],
    "started late": [step(n) for n in range(90_000, 90_010)],
    "many domains": [
        guard(n, f"domain {d}", language=f"l{d}") for n in range(9) for d in range(14)
    ],
    "routers": [
        event for n in range(1, 31) for event in (step(n), *([router(n)] if n % 5 == 0 else []))
    ],
    "routers damaged": [
        router(1, by_language=3, overlap="x", load_max_over_mean=[None]),
        step(2),
        router(2, dropped=None),
    ],
    "many sources": [
        step(n, tokens_by_source={f"s{i}": i for i in range(40)}) for n in range(1, 9)
    ],
}


@cache
def page_of(name: str) -> str:
    """Return the page of one of `SHAPES`, drawn once for all tests that look at it."""
    with TemporaryDirectory() as folder:
        return page(Path(folder), *SHAPES[name])


@pytest.mark.parametrize("name", SHAPES)
def test_run_of_any_shape_gives_a_well_formed_page_without_a_missing_coordinate(
    name: str, tmp_path: Path
) -> None:
    text = page(tmp_path, *SHAPES[name])
    assert {"section", "dl"} <= Tags(text).names
    drawn = charts(tmp_path)
    assert text.count("data-root-id") == len(drawn)
    for chart in drawn:
        chart.add_tooltips()
        values = [value for column in columns(chart) for value in column]
        numbers = [value for value in values if not isinstance(value, str)]
        for axis in (chart.figure.x_range, chart.figure.y_range):
            assert axis.start < axis.end
            numbers += [axis.start, axis.end]
        assert np.all(np.isfinite(numbers)) and "nan" not in values


def test_page_refers_to_nothing_outside_itself() -> None:
    text = page_of("long")
    tags = Tags(text)
    assert not tags.names & {
        "link",
        "img",
        "iframe",
        "object",
        "embed",
        "base",
        "form",
        "a",
        "use",
        "image",
    }
    assert not tags.attributes & {
        "src",
        "href",
        "xlink:href",
        "srcset",
        "action",
        "onload",
        "onclick",
    }
    assert library() in text
    own = text.replace(library(), "")
    assert not re.search(r"https?:|src=|@import|url\(|@font-face", own)
    assert "//" not in re.sub(r"<script.*?</script>", "", own, flags=re.DOTALL)


def test_browser_is_forbidden_to_fetch_anything() -> None:
    """Whatever the drawing library might want to load, the policy of the page denies it."""
    text = page_of("long")
    policy = re.findall(r'http-equiv="Content-Security-Policy" content="(.*?)"', text)
    assert policy == [
        "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
        "img-src data: blob:"
    ]
    assert text.index("Content-Security-Policy") < text.index("<script")


def test_content_of_files_is_escaped(tmp_path: Path) -> None:
    events = [
        step(
            1,
            loss_by_language={HOSTILE: 2.0},
            tokens_by_source={HOSTILE: 9},
            bytes_sent={HOSTILE: 9},
        ),
        guard(1, HOSTILE, language=HOSTILE, action=HOSTILE),
        {**checkpoint(1), "path": HOSTILE},
    ]
    config = json.dumps(
        {"model": {"path": "</p><img onerror=x>"}, "train": {"dtype": "<b>"}, "sp_size": "<i>"}
    )
    text = page(tmp_path, *events, config=config)
    tags = Tags(text)
    assert not tags.names & {"img", "b"} and "onerror" not in tags.attributes
    assert text.count("<script") == page_of("one step").count("<script")
    assert "<script>alert" not in text and "<i>" not in text
    assert "\u202e" not in text


def test_unprintable_and_overlong_text_is_replaced_and_cut() -> None:
    assert clean("a\u202eb\ud800<") == "a\\u202eb\\ud800<"
    assert clean("x" * 50, 10) == "xxxxxxx..."


def test_last_line_of_a_step_wins(tmp_path: Path) -> None:
    text = page(tmp_path, step(1), step(2, loss=7.0), step(2, loss=2.25))
    assert tiles(text)["Last loss"] == "2.250" and tiles(text)["Repeated steps"] == "1"


def test_resume_takes_back_everything_after_it(tmp_path: Path) -> None:
    before = [*(step(n) for n in range(1, 8)), guard(7), checkpoint(7)]
    run = read_run(run_dir(tmp_path, checkpoint(4), *before, step(5, loss=1.0), step(6)))
    assert run.steps.tolist() == [1, 2, 3, 4, 5, 6] and run.column("loss").tolist() == [
        3,
        3,
        3,
        3,
        1,
        3,
    ]
    assert run.guard_events == [] and [event["step"] for event in run.checkpoint_events] == [4]
    assert [mark.step for mark in run.marks] == [4] and run.num_repeated_steps == 3


def test_mark_of_a_resume_that_was_taken_back_is_gone() -> None:
    events = [step(n) for n in (1, 2, 3, 4, 3, 4, 2)]
    kept, repeated = current_branch(events)
    assert [event["step"] for event in kept] == [1, 2] and repeated == 5
    assert [mark.step for mark in marks(events)] == [1]


def test_last_measurement_of_a_domain_at_a_step_wins(tmp_path: Path) -> None:
    text = page(tmp_path, guard(0, delta_percent=4.0), guard(0, delta_percent=0.5))
    assert tiles(text)["Worst held-out domain"] == "+0.50 %"


def test_lines_that_are_no_events_are_passed_over(tmp_path: Path) -> None:
    folder = run_dir(
        tmp_path, step(1), {"event": "note"}, {"event": "step", "step": "2"}, {"step": 3}
    )
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('[1]\n5\n{"event": "step", "st')
    assert read_run(folder).steps.tolist() == [1]


def test_headline_numbers_are_those_of_the_log() -> None:
    assert tiles(page_of("long")) == {
        "Tokens": "30 k",
        "Last loss": "3.000",
        "Tokens/s, median": "500",
        "Goodput": "98.4 %",
        "Worst held-out domain": "+0.25 %",
        "Checkpoints": "1",
    }


def test_non_finite_loss_is_told(tmp_path: Path) -> None:
    text = page(tmp_path, step(1), step(2, loss=None), step(3, loss=math.nan))
    assert "not a finite number at 2 of 3 steps, first at step 2" in text


def test_tolerance_comes_from_the_configuration() -> None:
    assert "tolerance +1.5 %" in page_of("long")


def test_domain_is_drawn_against_its_own_tolerance(tmp_path: Path) -> None:
    own = "domains: {code: {tolerance_percent: 4.0}, math: {hard_limit_percent: 9.0}}"
    config = f"guard: {{tolerance_percent: 1.5, {own}}}\n"
    events = [guard(n, domain) for n in (1, 2) for domain in ("code", "math")]
    text = page(tmp_path, *events, config=config)
    assert "tolerance +1.5, +4 %" in text
    levels = {}
    for chart in charts(tmp_path):
        spans = chart.figure.select({"type": Span})
        levels[chart.title] = sorted(span.location for span in spans)
    assert levels["Held-out change of code"] == [0.0, 4.0]
    assert levels["Held-out change of math"] == [0.0, 1.5]


@pytest.mark.parametrize("config", [None, "[1, 2]", "a: [", "guard: 3"])
def test_damaged_configuration_leaves_the_measurements(config: str | None, tmp_path: Path) -> None:
    text = page(tmp_path, *long_run(), config=config)
    assert "tolerance +" not in text and tiles(text)["Worst held-out domain"] == "+0.25 %"


def test_action_is_marked_and_explained(tmp_path: Path) -> None:
    page(tmp_path, *long_run())
    told = [text for chart in charts(tmp_path) for column in columns(chart) for text in column]
    assert "warn, step 30: +0.25 %" in told


def test_sources_take_the_color_of_their_language(tmp_path: Path) -> None:
    mix = tmp_path / "mix.yaml"
    mix.write_text(
        "sources: [{name: ja_web, language: ja}, {name: en_web, language: en}]", encoding="utf-8"
    )
    text = page(tmp_path, step(1), config=json.dumps({"data": {"mix": str(mix)}}))
    mixture = text[text.index("Data mixture") : text.index("Learning rate")]
    assert f"--light:{PALETTE[0]}" in mixture and f"--light:{PALETTE[1]}" in mixture


def test_phases_of_the_mix_are_named_with_their_first_steps(tmp_path: Path) -> None:
    phases = ["main"] * 3 + ["shift"] * 4 + ["anneal"]
    events = [step(number, phase=name) for number, name in enumerate(phases, 1)]
    text = page(tmp_path, *events)
    assert "phases: main from step 1, shift from step 4, anneal from step 8" in text
    assert "phases:" not in page_of("one step")


@pytest.mark.parametrize("mix", ["/dev/zero", "pipe", "large"])
def test_mix_that_is_no_small_file_is_not_read(mix: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**30)
    config = json.dumps({"data": {"mix": str(tmp_path / mix)}})
    assert source_languages(read_run(run_dir(tmp_path, step(1), config=config))) == {}


def test_routers_are_shown_by_language_and_only_if_measured() -> None:
    text = page_of("routers")
    section = text[text.index("<h2>Routers") :]
    assert "assignments dropped: 0" in section and "ja 25" in section and "all 2.5," in section
    assert "<h2>Routers" not in page_of("long")


def test_divergence_from_the_base_model_is_shown_by_source_and_only_if_measured(
    tmp_path: Path,
) -> None:
    events = [step(n, kl_by_source={"en_web": 0.01 * n, "en_code": None}) for n in range(1, 21)]
    text = page(tmp_path, *events)
    assert (
        "Divergence from the base model" in text and "en_web 0.2<" in text and "en_code" not in text
    )
    assert "Divergence" not in page_of("one step")


def test_traces_are_shown_by_domain_and_only_if_measured(tmp_path: Path) -> None:
    events = [traces(10), traces(30, action="raise_replay", state="red"), traces(30, "ja-math")]
    text = page(tmp_path, *events)
    section = text[text.index("own replies") :]
    assert "en-math" in section and "0.03, red" in section and "ja-math" in section
    assert "raise_replay, step 30" in text
    assert "Held-out bits per byte" not in text
    assert "own replies" not in page_of("one step and its guard")


def test_directory_without_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no metrics\.jsonl"):
        write_report(tmp_path)


def test_failed_write_leaves_nothing_behind(tmp_path: Path) -> None:
    folder = run_dir(tmp_path, step(1))
    (folder / "report.html").mkdir()
    (folder / "report.html" / "occupied").touch()
    with pytest.raises(StorageError, match=r"report\.html"):
        write_report(folder)
    assert sorted(p.name for p in folder.iterdir()) == [
        "config.resolved.yaml",
        "metrics.jsonl",
        "report.html",
    ]


def test_states_of_the_guard_are_shown_where_they_were_measured(tmp_path: Path) -> None:
    before = page(tmp_path, guard(0), guard(10))
    assert "green: kept" not in before
    states = [guard(0, state="green"), guard(10, state="amber"), guard(20, state="red")]
    text = page(tmp_path, *states)
    for meaning in ("green: kept", "amber: neither", "red: lost"):
        assert meaning in text
    assert "+0.25 %, red" in text and "step 10: +0.25 %, amber" in text


def test_report_is_replaced_in_one_move(tmp_path: Path) -> None:
    page(tmp_path, step(1))
    first = (tmp_path / "report.html").stat().st_ino
    page(tmp_path, step(1), step(2))
    assert (tmp_path / "report.html").stat().st_ino != first
    assert not list(tmp_path.glob(".report*"))


def test_long_series_is_binned_and_keeps_its_extremes() -> None:
    x = np.arange(100_000, dtype=np.float64)
    y = np.sin(x / 5000)
    y[[31_415, 71_828]] = 50.0, -50.0
    series = bin_series(x, y)
    assert len(series) <= MAX_POINTS
    assert series.high.max() == 50.0 and series.low.min() == -50.0
    assert np.all(np.diff(series.x) > 0) and np.all(
        (series.low <= series.mean) & (series.mean <= series.high)
    )


def test_short_series_is_drawn_point_by_point_without_its_gaps() -> None:
    x, y = np.arange(5.0), np.asarray([1.0, math.nan, 3.0, math.inf, 5.0])
    series = bin_series(x, y)
    assert series.x.tolist() == [0, 2, 4] and series.mean.tolist() == series.low.tolist() == [
        1,
        3,
        5,
    ]


def test_page_of_a_long_run_stays_small(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    text = page(tmp_path, *(step(n, loss=float(rng.normal())) for n in range(1, 6001)))
    longest = max(len(column) for chart in charts(tmp_path) for column in columns(chart))
    assert longest <= MAX_POINTS
    assert len(text) - len(library()) < 600_000 and len(text) < 2_500_000


@pytest.mark.parametrize("num_points, num_bins", [(1, 1), (7, 3), (1000, 150), (5, 150)])
def test_bins_cover_every_point_once(num_points: int, num_bins: int) -> None:
    starts = bin_starts(np.arange(num_points, dtype=np.float64), num_bins)
    assert (
        starts[0] == 0
        and np.all(np.diff(starts) > 0)
        and len(starts) <= num_bins
        and starts[-1] < num_points
    )


def test_scale_turns_logarithmic_only_when_asked_and_needed() -> None:
    wide, narrow = np.asarray([0.1, 10.0]), np.asarray([1.0, 2.0])
    assert range_over([wide], log_beyond=20).log and not range_over([narrow], log_beyond=20).log
    assert not range_over([wide]).log and not range_over([wide, np.zeros(1)], log_beyond=20).log


def test_steps_start_at_zero_unless_the_log_starts_late() -> None:
    assert step_range(np.arange(1.0, 31.0)).low == 0
    assert step_range(np.arange(9000.0, 9031.0)).low == 9000


def test_tooltips_tell_the_values_of_all_lines_at_a_step() -> None:
    chart = StepChart(
        height=100,
        steps=Range1d(start=0, end=9),
        values=AxisRange(low=0.0, high=1.0),
        unit="nats",
        title="two lines",
    )
    whole = bin_series(np.asarray([1.0, 2.0, 3.0]), np.asarray([0.5, 0.25, 0.125]))
    gap = bin_series(np.asarray([1.0, 3.0]), np.asarray([0.75, 0.5]), np.zeros(2), np.ones(2))
    chart.line("whole", whole, PALETTE[0])
    chart.line("gap", gap, PALETTE[1])
    chart.add_tooltips()
    found = columns(chart)
    assert [1.0, 2.0, 3.0] in found and ["0.5", "0.25", "0.125"] in found
    assert ["0.75 (0 to 1)", "", "0.5 (0 to 1)"] in found


STATES: dict[RunState, str] = {
    "running": "running",
    "stopped": "stopped",
    "paused": "paused by the guard",
    "failed": "failed",
    "finished": "finished",
    "never started": "never started",
    "unknown": "unknown",
}


@pytest.mark.parametrize("state", STATES)
def test_state_stands_first_with_its_cause(state: RunState, tmp_path: Path) -> None:
    folder = run_dir(tmp_path, *long_run())
    overview = replace(
        run_overview(folder),
        state=state,
        cause="rank 1 <was> killed",
        exit_code=70,
        problems=("P",),
    )
    text = render_report(overview, read_run(folder))
    card = text[text.index('<section class="state') : text.index('<dl class="tiles">')]
    assert f'<p class="word">{STATES[state]}<small>step 30 of 30 (100 %)' in card
    assert "rank 1 &lt;was&gt; killed" in card and '<p class="problem">P</p>' in card
    assert ("(exit code 70)" in card) == (state == "failed")
    assert f": {STATES[state]}</title>" in text


def test_time_to_go_is_told_while_a_run_is_running(tmp_path: Path) -> None:
    folder = run_dir(tmp_path, *long_run())
    overview = replace(run_overview(folder), state="running", eta_seconds=7260.0)
    assert "2 h 1 min to go" in render_report(overview, read_run(folder))
    assert "to go" not in page_of("long")


def test_durations_are_told_in_units_that_fit() -> None:
    told = [duration(seconds) for seconds in (0.4234, 65.0, 3 * 3600 + 1200.0, 100 * 3600.0)]
    assert told == ["0.423 s", "1 min 5 s", "3 h 20 min", "4 days 4 h"]


def test_guard_stands_against_its_tolerance_and_tells_its_last_actions(tmp_path: Path) -> None:
    decision = {
        "event": "guard_decision",
        "step": 20,
        "action": "raise_replay",
        "reason": "english is red",
        "actions": {"english": "raise_replay"},
    }
    events = [step(20), guard(20, state="red", delta_percent=3.0), decision]
    text = page(tmp_path, *events)
    now = text[text.index("<h2>The guard now") : text.index("<h2>Last actions of the guard")]
    assert "<td>+3.00 %</td><td>+1.50 %</td><td>200 %</td>" in now
    assert '<td class="tone-alarm">red</td>' in now
    assert "<td>raise_replay</td>" in text
    assert "The guard now" not in page_of("one step")


@pytest.mark.parametrize("colors", [LIGHT, DARK], ids=["light", "dark"])
def test_text_has_a_contrast_of_at_least_4_5(colors: dict[str, str]) -> None:
    for surface in SURFACES:
        for text in TEXTS:
            found = contrast(colors[surface], colors[text])
            assert found >= 4.5, f"{text} on {surface}: {found:.2f}"


def test_lines_have_a_contrast_of_at_least_3_in_both_schemes() -> None:
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    for color in COUNTERPARTS.keys() - {CARD, GRID}:
        assert contrast(color, CARD) >= 3, color
        assert contrast(dark_of(color), DARK["card"]) >= 3, color


def test_every_color_of_a_chart_has_a_dark_counterpart(tmp_path: Path) -> None:
    text = page(tmp_path, *SHAPES["many sources"], *SHAPES["routers"])
    facts = json.loads(re.findall(r'id="facts">(.*?)</script>', text)[0])
    drawn = text[text.index("docs_json") :]
    used = set(re.findall(r'_color":(?:{"type":"value","value":)?"(#\w+)"', drawn))
    assert len(used) > 5 and used <= facts["dark"].keys()
    assert counterparts(["#0072b2 #123456"]).keys() == {"#0072b2", "#123456"}
    assert facts["dark"][PALETTE[0]] == dark_of(PALETTE[0])


def test_starts_and_rollbacks_are_marked_in_every_chart_and_listed(tmp_path: Path) -> None:
    events = [
        start(0),
        *(step(n) for n in range(1, 8)),
        start(4, time=1.8e9 + 900, previous_end=1.8e9 + 600),
        *(step(n) for n in range(5, 11)),
        {"event": "rollback", "step": 8, "from_step": 10, "to_step": 8},
        *(step(n) for n in range(9, 12)),
        end(11, exit_code=75, cause="stopped on <request>"),
    ]
    found = marks(events)
    assert [(mark.step, mark.kind) for mark in found] == [(4, "start"), (8, "rollback")]
    text = page(tmp_path, *events)
    for chart in charts(tmp_path):
        spans = [span for span in chart.figure.select({"type": Span}) if span.dimension == "height"]
        assert {(span.location, span.line_dash[0]) for span in spans} == {(4, 2), (8, 6)}
    listed = text[text.index("<h2>Starts") :]
    assert "ended without a word" in listed and "stopped on &lt;request&gt;" in listed
    assert '<time datetime="2027-01-15T08:00:00+00:00">2027-01-15 08:00 UTC</time>' in listed
    assert "started again" in text and "went back to a checkpoint" in text
    assert "<h2>Starts" not in page(tmp_path, start(0), step(1))


def test_resume_of_a_log_without_starts_is_marked() -> None:
    assert [mark.step for mark in marks([step(1), step(2), step(3), step(2)])] == [1]


def test_tokens_of_a_step_are_those_of_all_steps_before(tmp_path: Path) -> None:
    events = [step(n, tokens=1000 * n) for n in range(1, 101)]
    axis = token_axis(read_run(run_dir(tmp_path, *events)))
    assert axis is not None and axis["unit"] == "million predicted tokens"
    by_step = dict(zip(axis["steps"], axis["tokens"], strict=True))
    assert by_step[0] == 0 and by_step[2] == 0.003 and by_step[100] == 5.05
    assert token_axis(read_run(run_dir(tmp_path, *SHAPES["bare steps"]))) is None


def test_log_axis_has_round_ticks_within_its_range_and_says_what_it_is(tmp_path: Path) -> None:
    assert log_ticks(0.4, 60.0, 7) == [0.5, 1, 2, 5, 10, 20, 50]
    assert log_ticks(0.4, 60.0, 4) == [1, 3, 10, 30]
    assert log_ticks(1e-8, 1e8, 4) == pytest.approx([1e-8, 1e-3, 1e2, 1e7])
    run_dir(tmp_path, *(step(n, grad_norm=53.0 if n == 7 else 0.5) for n in range(1, 20)))
    (chart,) = [chart for chart in charts(tmp_path) if "Gradient norm" in chart.title]
    assert chart.figure.yaxis[0].axis_label == "L2 norm, log scale"
    ticks = chart.figure.yaxis[0].ticker.ticks
    assert len(ticks) >= 4 and max(ticks) > 20


@pytest.mark.parametrize("has_mixture", [True, False])
@pytest.mark.parametrize("num_small", range(8))
def test_panels_leave_no_hole(num_small: int, has_mixture: bool) -> None:
    mixture = Panel(title="mixture") if has_mixture else None
    placed = around_mixture(mixture, [Panel(title=str(n)) for n in range(num_small)])
    cells = sum(panel.width * panel.num_rows for panel in placed)
    assert cells % 12 == 0 and len(placed) == num_small + has_mixture


def test_panel_without_a_neighbor_takes_the_row() -> None:
    left = Panel(title="left", width=5)
    assert [panel.width for panel in beside(left, None)] == [12]
    assert beside(None, None) == []


def test_run_that_sent_nothing_and_has_no_guard_shows_no_empty_card(tmp_path: Path) -> None:
    text = page(tmp_path, *(step(n, bytes_sent={"ulysses": 0}) for n in range(1, 9)))
    assert "On the wire" not in text and "Held-out" not in text and "The guard" not in text


def test_utilization_and_memory_are_shown_where_they_are_logged(tmp_path: Path) -> None:
    text = page(tmp_path, step(1, utilization=0.425, peak_memory_bytes=3 * 2**30))
    assert tiles(text)["Utilization"] == "42.5 %" and tiles(text)["Peak memory"] == "3 GiB"
    assert "<h2>Utilization" in text and "<h2>Peak memory of rank 0" in text
    assert "Utilization" not in page_of("one step")


def test_damaged_files_of_any_kind_give_a_page(tmp_path: Path) -> None:
    folder = run_dir(tmp_path, step(1), config="a: &a [1]\nb: *a\n")
    with open(folder / "metrics.jsonl", "ab") as file:
        file.write(b'{"a": ' + b"[" * 100_000 + b'\n\xff\xfe\n{"event": ' + b"9" * 5000 + b"}\n")
    assert "3 lines are no JSON objects" in write_report(folder).read_text(encoding="utf-8")


def test_page_of_a_run_that_leaves_tells_how_it_leaves(tmp_path: Path) -> None:
    folder = run_dir(tmp_path, *long_run())
    text = write_report(folder, leaving="paused", cause="english is red").read_text("utf-8")
    assert "paused by the guard<small>" in text and "<p>english is red</p>" in text


def test_steps_of_a_short_run_are_whole_numbers(tmp_path: Path) -> None:
    run_dir(tmp_path, *(step(n) for n in range(1, 4)))
    assert {chart.figure.xaxis[0].ticker.min_interval for chart in charts(tmp_path)} == {1}

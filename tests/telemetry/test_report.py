"""The report is one self-contained page, true to the log, for runs of any length and with anything
in their files.
"""

from __future__ import annotations

import json
import math
import re
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bokeh.models import ColumnDataSource, Range1d
from bokeh.resources import Resources

from cpt.errors import ConfigError, StorageError
from cpt.telemetry.report.chart import StepChart
from cpt.telemetry.report.history import current_branch, read_run
from cpt.telemetry.report.page import all_panels, write_report
from cpt.telemetry.report.panel import clean
from cpt.telemetry.report.series import (
    MAX_POINTS,
    AxisRange,
    bin_series,
    bin_starts,
    range_over,
    step_range,
)
from data_pipeline.charts import PALETTE

CONFIG = """
model: {init: tiny}
train: {total_steps: 30, gradient_clipping: 1.0}
guard: {tolerance_percent: 1.5}
"""
HOSTILE = "<script>alert(1)</script>&\"'\u202e\ud800"


def step(number: int, **changes: Any) -> dict[str, Any]:
    event = {
        "event": "step",
        "step": number,
        "loss": 3.0,
        "grad_norm": 0.5,
        "lr": 1e-5,
        "tokens": 1000,
        "seconds": 2.0,
        "tokens_per_second": 500.0,
        "loss_by_language": {"ja": 3.5, "en": 2.5},
        "tokens_by_source": {"ja_web": 600, "en_web": 400},
        "bytes_sent": {"ulysses": 2048, "halo": 512},
    }
    return {**event, **changes}


def guard(number: int, domain: str = "english", **changes: Any) -> dict[str, Any]:
    event = {
        "event": "guard",
        "step": number,
        "domain": domain,
        "language": "en",
        "bits_per_byte": 0.9,
        "baseline": 0.9,
        "delta_percent": 0.25,
        "ci_low": 0.125,
        "ci_high": 0.5,
        "action": "none",
    }
    return {**event, **changes}


def traces(number: int, domain: str = "en-math", **changes: Any) -> dict[str, Any]:
    event = {
        "event": "guard",
        "kind": "traces",
        "step": number,
        "domain": domain,
        "language": "en",
        "divergence": 0.001 * number,
        "control_divergence": 0.002 * number,
        "delta": 0.002 * number,
        "lower_bound": 0.0015 * number,
        "upper_bound": 0.0025 * number,
        "tolerance": 0.1,
        "state": "green",
        "action": "none",
    }
    return {**event, **changes}


def checkpoint(number: int) -> dict[str, Any]:
    return {"event": "checkpoint", "step": number, "path": f"step-{number:08d}", "seconds": 1.0}


def run_dir(tmp_path: Path, *events: dict[str, Any], config: str | None = CONFIG) -> Path:
    (tmp_path / "metrics.jsonl").write_text(
        "".join(json.dumps(event) + "\n" for event in events), encoding="utf-8"
    )
    if config is not None:
        (tmp_path / "config.resolved.yaml").write_text(config, encoding="utf-8")
    return tmp_path


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
    return [cell.chart for panel in all_panels(read_run(folder)) for cell in panel.cells]


def columns(chart: StepChart) -> list[list[Any]]:
    """All columns of numbers or texts that a chart draws from."""
    sources = chart.figure.select({"type": ColumnDataSource})
    return [list(column) for source in sources for column in source.data.values()]


class Tags(HTMLParser):
    """Remembers every tag and attribute name of a page, and that tags are closed in order."""

    VOID = ("meta", "br")

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


def long_run() -> list[dict[str, Any]]:
    return [
        guard(0, delta_percent=0.0),
        *(step(n) for n in range(1, 31)),
        guard(30, action="warn"),
        checkpoint(30),
    ]


def router(number: int, **changes: Any) -> dict[str, Any]:
    drift = 1 - number / 400
    values = {"load_max_over_mean": [1.5, 2.0 + number / 20, None], "overlap": [1.0, drift]}
    languages = {
        "en": {"distance": [0.1, 0.12], "load_max_over_mean": [1.7, 2.2], "overlap": [1.0, drift]},
        "ja": {
            "distance": [0.3, 0.2],
            "load_max_over_mean": [2.5, 3.0],
            "overlap": [0.99, drift - 0.05],
        },
    }
    return {
        "event": "router",
        "step": number,
        "dropped": 0,
        "by_language": languages,
        **values,
        **changes,
    }


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


@pytest.mark.parametrize("name", SHAPES)
def test_run_of_any_shape_gives_a_well_formed_page(name: str, tmp_path: Path) -> None:
    text = page(tmp_path, *SHAPES[name])
    assert {"section", "dl"} <= Tags(text).names
    assert text.count("data-root-id") == len(charts(tmp_path))


@pytest.mark.parametrize("name", SHAPES)
def test_no_coordinate_is_missing(name: str, tmp_path: Path) -> None:
    for chart in charts(run_dir(tmp_path, *SHAPES[name])):
        chart.add_tooltips()
        values = [value for column in columns(chart) for value in column]
        numbers = [value for value in values if not isinstance(value, str)]
        for axis in (chart.figure.x_range, chart.figure.y_range):
            assert axis.start < axis.end
            numbers += [axis.start, axis.end]
        assert np.all(np.isfinite(numbers)) and "nan" not in values


def test_page_refers_to_nothing_outside_itself(tmp_path: Path) -> None:
    text = page(tmp_path, *long_run())
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


def test_browser_is_forbidden_to_fetch_anything(tmp_path: Path) -> None:
    """Whatever the drawing library might want to load, the policy of the page denies it."""
    text = page(tmp_path, *long_run())
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
    assert text.count("<script") == page(tmp_path, step(1)).count("<script")
    assert "<script>alert" not in text and "<i>" not in text
    assert "\u202e" not in text


def test_unprintable_and_overlong_text_is_replaced_and_cut() -> None:
    assert clean("a\u202eb\ud800<") == "a?b?<"
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
    assert run.resumes == [5] and run.num_repeated_steps == 3


def test_mark_of_a_resume_that_was_taken_back_is_gone() -> None:
    events = [step(n) for n in (1, 2, 3, 4, 3, 4, 2)]
    kept, resumes, repeated = current_branch(events)
    assert [event["step"] for event in kept] == [1, 2] and resumes == [2] and repeated == 5


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


def test_headline_numbers_are_those_of_the_log(tmp_path: Path) -> None:
    assert tiles(page(tmp_path, *long_run())) == {
        "Steps": "30",
        "Tokens": "30 k",
        "Last loss": "3.000",
        "Tokens/s, median": "500",
        "Worst held-out domain": "+0.25 %",
        "Checkpoints": "1",
    }


def test_non_finite_loss_is_told(tmp_path: Path) -> None:
    text = page(tmp_path, step(1), step(2, loss=None), step(3, loss=math.nan))
    assert "not a finite number at 2 of 3 steps, first at step 2" in text


def test_tolerance_comes_from_the_configuration(tmp_path: Path) -> None:
    assert "tolerance +1.5 %" in page(tmp_path, *long_run())


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
    assert f"background:{PALETTE[0]}" in mixture and f"background:{PALETTE[1]}" in mixture


def test_routers_are_shown_by_language_and_only_if_measured(tmp_path: Path) -> None:
    text = page(tmp_path, *SHAPES["routers"])
    section = text[text.index("<h2>Routers") :]
    assert "assignments dropped: 0" in section and "ja 25" in section and "all 2.5," in section
    assert "<h2>Routers" not in page(tmp_path, *SHAPES["long"])


def test_divergence_from_the_base_model_is_shown_by_source_and_only_if_measured(
    tmp_path: Path,
) -> None:
    events = [step(n, kl_by_source={"en_web": 0.01 * n, "en_code": None}) for n in range(1, 21)]
    text = page(tmp_path, *events)
    assert (
        "Divergence from the base model" in text and "en_web 0.2<" in text and "en_code" not in text
    )
    assert "Divergence" not in page(tmp_path, step(1))


def test_traces_are_shown_by_domain_and_only_if_measured(tmp_path: Path) -> None:
    events = [traces(10), traces(30, action="raise_replay", state="red"), traces(30, "ja-math")]
    text = page(tmp_path, *events)
    section = text[text.index("own replies") :]
    assert "en-math" in section and "0.03, red" in section and "ja-math" in section
    assert "raise_replay, step 30" in text
    assert "The guard has measured nothing" in text  # of held-out text
    assert "own replies" not in page(tmp_path, step(1), guard(1))


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
    assert len(text) - len(library()) < 600_000 and len(text) < 5_000_000


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

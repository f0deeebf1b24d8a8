"""Runs are laid over each other on one page that says what differs between them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cpt.cli import main
from cpt.errors import ConfigError
from cpt.telemetry.report.comparison import (
    HIDDEN,
    compared_runs,
    comparison_panels,
    flat_settings,
    render_comparison,
    short_names,
    write_comparison,
)
from cpt.telemetry.report.history import read_run
from cpt.telemetry.run_overview import run_overview
from tests.support.browser import running_browser
from tests.support.run_events import end, guard, start
from tests.support.run_folders import CONFIG, falling_steps, make_run

LOW_RATE = "train: {total_steps: 30, lr: 1.0e-5}\nguard: {tolerance_percent: 1.0}\n"


@pytest.fixture
def two_runs(tmp_path: Path) -> list[Path]:
    first = [
        start(0),
        *falling_steps(1, 20),
        guard(10, delta_percent=0.3),
        guard(20, delta_percent=0.6),
    ]
    second = [
        start(0),
        *falling_steps(1, 10, tokens=4000),
        guard(10, delta_percent=-1.0),
        guard(10, "code", delta_percent=2.0),
    ]
    return [
        make_run(tmp_path / "base", *first, end(20)),
        make_run(tmp_path / "slow", *second, config=LOW_RATE),
    ]


def test_page_has_every_panel_with_a_line_of_each_run(two_runs: list[Path]) -> None:
    runs = {path.name: (run_overview(path), read_run(path)) for path in two_runs}
    panels = {panel.title: panel for panel in comparison_panels(compared_runs(runs), "steps")}
    assert list(panels) == [
        "Where they stand",
        "Training loss",
        "The guard's domains against the untouched model",
        "Learning rate",
        "Throughput",
        "Share of each source, replay included",
        "Differences of the configurations",
    ]
    legend = [entry.text for entry in panels["Training loss"].legend]
    assert legend == ["base 3", "slow 3.5"]
    headings = [
        cell.heading for cell in panels["The guard's domains against the untouched model"].cells
    ]
    assert headings == ["english", "code"]
    differences = panels["Differences of the configurations"].table
    assert differences is not None
    assert [row.texts for row in differences.rows] == [("train.lr", "-", "1e-05")]


def test_over_tokens_each_run_has_the_tokens_that_it_had_seen(two_runs: list[Path]) -> None:
    runs = {path.name: (run_overview(path), read_run(path)) for path in two_runs}
    panels = comparison_panels(compared_runs(runs), "tokens")
    chart = panels[1].cells[0].chart
    told = list(chart._told.values())
    np.testing.assert_allclose(told[0].x, np.arange(1, 21))  # in thousands
    np.testing.assert_allclose(told[1].x, 4 * np.arange(1, 11))
    assert chart.figure.xaxis[0].axis_label == "thousand predicted tokens"


def test_secrets_in_settings_are_hidden() -> None:
    config = {"telemetry": {"wandb_api_key": "canary"}, "a": {"PASSWORD": 1}, "train": {"lr": 2}}
    settings = flat_settings(config)
    assert settings == {
        "telemetry.wandb_api_key": HIDDEN,
        "a.PASSWORD": HIDDEN,
        "train.lr": "2",
    }


def test_names_are_as_long_as_it_takes_to_tell_runs_apart() -> None:
    assert short_names([Path("/x/a/run"), Path("/x/b/run")]) == ["a/run", "b/run"]
    assert short_names([Path("/x/a"), Path("/x/b")]) == ["a", "b"]
    assert len(set(short_names([Path("/x/a"), Path("/x/a")]))) == 2


def test_hostile_names_stay_text(tmp_path: Path) -> None:
    hostile = "<script>alert(1)</script>"
    events = [start(0), *falling_steps(1, 5), guard(5, hostile, delta_percent=0.1)]
    config = CONFIG + f'x: "{hostile}"\n'
    run = make_run(tmp_path / "a", *events, config=config)
    page = render_comparison(
        {hostile: (run_overview(run), read_run(run)), "b": (run_overview(run), read_run(run))},
        "steps",
    )
    assert hostile not in page and "&lt;script&gt;alert(1)" in page


def test_what_is_no_run_is_refused(tmp_path: Path, two_runs: list[Path]) -> None:
    with pytest.raises(ConfigError, match="holds no metrics"):
        write_comparison([two_runs[0], tmp_path], tmp_path / "out.html", "steps")
    assert main(["compare", str(two_runs[0])]) == ConfigError.exit_code


def test_page_is_readable_at_both_widths_and_in_both_color_schemes(
    tmp_path: Path, two_runs: list[Path]
) -> None:
    out = tmp_path / "compare.html"
    assert main(["compare", *map(str, two_runs), "--out", str(out), "--axis", "tokens"]) == 0
    with running_browser() as browser:
        for width, dark in ((1280, False), (390, True)):
            page = browser.open(out.as_uri(), width=width, dark=dark)
            page.wait_for("document.querySelector('html.ready') !== null")
            assert page.complaints == []
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            text = page.evaluate("document.body.innerText")
            assert "base / slow" in text and "Differences of the configurations" in text
            assert page.evaluate("document.querySelectorAll('.charts [role=img]').length") == 7


def test_no_tick_lies_between_two_steps(two_runs: list[Path]) -> None:
    runs = {path.name: (run_overview(path), read_run(path)) for path in two_runs}
    steps = comparison_panels(compared_runs(runs), "steps")[1].cells[0].chart.figure
    tokens = comparison_panels(compared_runs(runs), "tokens")[1].cells[0].chart.figure
    assert steps.xaxis[0].ticker.min_interval == 1
    assert tokens.xaxis[0].ticker.min_interval == 0

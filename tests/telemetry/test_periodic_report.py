"""report.html is drawn now and then beside a run, by a process of its own."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from cpt.telemetry.report.periodic import PeriodicReport
from tests.support.run_events import run_dir, step


def test_page_is_drawn_beside_a_run_when_it_is_time(tmp_path: Path) -> None:
    folder = run_dir(tmp_path, step(1))
    for interval_seconds in (0, 3600):
        report = PeriodicReport(folder, interval_seconds)
        report.refresh()
        report.close()
    assert not (folder / "report.html").exists()
    report = PeriodicReport(folder, 1e-9)
    report.refresh()
    report.refresh()  # one at a time
    end_time = time.monotonic() + 120
    while not (folder / "report.html").exists() and time.monotonic() < end_time:
        time.sleep(0.05)
    report.close()
    assert "Last loss" in (folder / "report.html").read_text(encoding="utf-8")


def test_drawing_that_cannot_start_costs_a_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(sys, "executable", str(tmp_path / "nothing"))
    report = PeriodicReport(run_dir(tmp_path, step(1)), 1e-9)
    report.refresh()
    report.close()
    assert "report.html is not drawn" in caplog.text and "No such file" in caplog.text


def test_drawing_that_fails_is_told_once_with_its_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho trace >&2\necho no font >&2\nexit 70\n")
    program.chmod(0o700)
    monkeypatch.setattr(sys, "executable", str(program))
    report = PeriodicReport(run_dir(tmp_path, step(1)), 1e-9)
    for _ in range(2):
        report.refresh()
        assert report._process is not None
        report._process.wait()
    report.close()
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told == [
        "report.html is not drawn: cpt report ended with 70 (no font). Training is not affected."
    ]

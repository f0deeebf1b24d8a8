"""The page that a run draws when it leaves: its state, and nothing older after it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch.distributed as dist

from cpt.job.run_report import draw_report_of_leaving, draw_report_together
from cpt.resilience.phase import PhaseClock
from tests.support.run_events import long_run, run_dir


class Drawing:
    """Stands in for the page that is drawn while the run goes on."""

    is_closed = False

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def group() -> Iterator[Any]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield dist.group.WORLD
    dist.destroy_process_group()


def make_job(folder: Path, group: Any = None, report: Drawing | None = None) -> Any:
    return SimpleNamespace(
        run_dir=folder,
        report=report,
        clock=PhaseClock(),
        progress=SimpleNamespace(step=30),
        topology=SimpleNamespace(control_group=group),
    )


def test_pause_is_told_by_the_page_with_its_reason(tmp_path: Path, group: Any) -> None:
    drawing = Drawing()
    job = make_job(run_dir(tmp_path, *long_run()), group, drawing)
    draw_report_together(job, "paused", "english is red")
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "paused by the guard<small>" in text and "<p>english is red</p>" in text
    assert drawing.is_closed


def test_other_ranks_draw_nothing(tmp_path: Path) -> None:
    assert draw_report_of_leaving(make_job(run_dir(tmp_path, *long_run())), "finished") is None
    assert not (tmp_path / "report.html").exists()


def test_page_that_cannot_be_drawn_costs_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = run_dir(tmp_path, *long_run())
    (folder / "report.html").mkdir()
    (folder / "report.html" / "occupied").touch()
    assert draw_report_of_leaving(make_job(folder, report=Drawing()), "finished") is None
    assert "report.html is not drawn" in caplog.text

"""report.html of a run that is about to leave its directory in a state that a person should see."""

from __future__ import annotations

from pathlib import Path

from cpt.job.job import Job
from cpt.parallel.agreement import on_first_rank
from cpt.resilience.best_effort import best_effort
from cpt.telemetry.report.page import write_report
from cpt.telemetry.run_overview import RunState


def draw_report_of_leaving(job: Job, state: RunState, cause: str = "") -> Path | None:
    """Draw the page on the first rank; an error costs a warning.

    Args:
        job: The run.
        state: State in which the run leaves.
        cause: Why, in one line; empty where the state says it all.

    Returns:
        The page; None on other ranks, and if it could not be drawn.
    """
    if job.report is None:
        return None
    # an older page must not come after this one
    job.report.close()
    with best_effort("report.html is not drawn"):
        return write_report(job.run_dir, leaving=state, cause=cause)
    return None


def draw_report_together(job: Job, state: RunState, cause: str = "") -> None:
    """Draw the page on the first rank while the others wait, so that no launcher ends it.

    The arguments are those of `draw_report_of_leaving`; all ranks call this.
    """
    job.clock.enter("export", job.progress.step)

    def draw() -> None:
        draw_report_of_leaving(job, state, cause)

    on_first_rank(job.topology.control_group, draw)

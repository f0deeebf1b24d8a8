"""report.html of a run that is about to leave its directory in a state that a person should see."""

from __future__ import annotations

from cpt.job.job import Job
from cpt.parallel.agreement import on_first_rank
from cpt.resilience.best_effort import best_effort
from cpt.telemetry.report.page import write_report
from cpt.telemetry.run_overview import RunState


def draw_last_report(job: Job, state: RunState, cause: str = "") -> None:
    """Draw the page on the first rank while the others wait; an error costs a warning.

    Args:
        job: The run; all ranks call this.
        state: State in which the run leaves.
        cause: Why, in one line; empty where the state says it all.
    """

    def draw() -> None:
        with best_effort("report.html is not drawn"):
            write_report(job.run_dir, leaving=state, cause=cause)

    job.clock.enter("export", job.progress.step)
    on_first_rank(job.topology.control_group, draw)

"""`cpt report`: write report.html of a run."""

from __future__ import annotations

import argparse
from pathlib import Path

from cpt.commands import Commands
from cpt.commands.early_checks import own_run_dir_problems, refuse
from data_pipeline.console.say import say
from data_pipeline.escaping import escaped_line


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "report", help="write report.html of a run, also while the run goes on"
    )
    parser.add_argument("--run_dir", type=Path, required=True, help="run directory")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    refuse(own_run_dir_problems(options.run_dir))
    from cpt.telemetry.report.page import write_report

    say(escaped_line(write_report(options.run_dir)))

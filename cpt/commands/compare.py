"""`cpt compare`: runs laid over each other on one page."""

from __future__ import annotations

import argparse
from pathlib import Path

from cpt.commands import Commands
from data_pipeline.console.say import say
from data_pipeline.escaping import escaped_line


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "compare", help="write a page that lays runs over each other, also while they go on"
    )
    parser.add_argument("run_dirs", type=Path, nargs="+", metavar="RUN", help="run directory")
    parser.add_argument("--out", type=Path, default=Path("compare.html"), help="page to write")
    parser.add_argument(
        "--axis", choices=("steps", "tokens"), default="steps", help="what the charts count"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from cpt.telemetry.report.comparison import write_comparison

    say(escaped_line(write_comparison(options.run_dirs, options.out, options.axis)))

"""`cpt status`: tell how far a run is; job scripts read the exit code."""

from __future__ import annotations

import argparse
from pathlib import Path

from cpt.commands import Commands
from data_pipeline.console.say import say


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "status", help="tell how far a run is; exit code 0 only if its planned last step is saved"
    )
    parser.add_argument("--run_dir", type=Path, required=True, help="run directory")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    import time

    from cpt.checkpoint.status import check_finished
    from cpt.telemetry.overview_text import describe_overview
    from cpt.telemetry.run_overview import run_overview

    say(describe_overview(run_overview(options.run_dir), time.time()), flush=True)
    say(check_finished(options.run_dir))

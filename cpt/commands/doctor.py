"""`cpt doctor`: tell what this machine can train with."""

from __future__ import annotations

import argparse

from cpt.commands import Commands


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "doctor", help="versions, devices, and which attention backends run here, or why not"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from cpt.commands.doctor_report import main

    main()

"""`cpt guard audit`: check that every decision of a run's guard follows from its evidence."""

from __future__ import annotations

import argparse
from pathlib import Path

from cpt.commands import Commands


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser("guard", help="check what the guard of a run decided")
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    audit = actions.add_parser(
        "audit", help="make every decision again from what the run left, and compare"
    )
    audit.add_argument("--run_dir", type=Path, required=True)
    audit.set_defaults(run=_run_audit)


def _run_audit(options: argparse.Namespace) -> None:
    from cpt.guard.audit import audit, check_agreement

    print(check_agreement(audit(options.run_dir)))

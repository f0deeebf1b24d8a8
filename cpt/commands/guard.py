"""`cpt guard`: what the guard of a run decided, and what its yardsticks say of an export.

`audit` checks that every decision follows from its evidence. `divergence` measures a Hugging Face
directory on the run's own traces.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from cpt.commands import Commands
from cpt.commands.early_checks import (
    model_problems,
    own_run_dir_problems,
    refuse,
    run_dir_problems,
)
from cpt.commands.shared_options import add_ranks, rank_options, tell
from data_pipeline.console.say import say


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "guard", help="check what the guard of a run decided, or measure an export"
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    audit = actions.add_parser(
        "audit", help="make every decision again from what the run left, and compare"
    )
    audit.add_argument("--run_dir", type=Path, required=True, help="run directory")
    audit.set_defaults(run=_run_audit)
    divergence = actions.add_parser(
        "divergence", help="measure an export on the traces of a run, to choose their tolerance"
    )
    divergence.add_argument("--run_dir", type=Path, required=True, help="run directory")
    divergence.add_argument(
        "--model", type=Path, required=True, help="exported directory, also in MXFP4"
    )
    add_ranks(divergence)
    divergence.set_defaults(run=_run_divergence)


def _run_audit(options: argparse.Namespace) -> None:
    refuse(run_dir_problems(options.run_dir))
    from cpt.guard.audit import audit, check_agreement

    say(check_agreement(audit(options.run_dir)))


def _run_divergence(options: argparse.Namespace) -> None:
    refuse(own_run_dir_problems(options.run_dir), model_problems("--model", options.model))
    from cpt.offline.trace_divergence import divergence_report

    tell(divergence_report(options.run_dir, options.model, rank_options(options)))

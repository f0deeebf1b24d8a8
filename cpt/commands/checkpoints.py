"""`cpt checkpoints`: list the checkpoints of a run and say which are usable."""

from __future__ import annotations

import argparse
from pathlib import Path

from cpt.commands import Commands
from cpt.commands.early_checks import refuse, run_dir_problems
from cpt.errors import CheckpointError
from data_pipeline.console.say import say


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "checkpoints", help="list the checkpoints of a run with a verdict on each"
    )
    parser.add_argument("--run_dir", type=Path, required=True, help="run directory")
    parser.add_argument(
        "--verify", action="store_true", help="hash every file; default: manifests, names and sizes"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    refuse(run_dir_problems(options.run_dir))
    from cpt.checkpoint.listing import MAX_LISTED, checkpoint_table, list_checkpoints

    listed = list_checkpoints(options.run_dir, verify=options.verify)
    if not listed:
        say(f"{options.run_dir} holds no checkpoint yet.")
        return
    say(checkpoint_table(listed))
    if len(listed) >= MAX_LISTED:
        say(f"Only the newest {MAX_LISTED:,} folders of a kind are listed.")
    if not any(one.is_usable for one in listed):
        raise CheckpointError("none of them is usable.")

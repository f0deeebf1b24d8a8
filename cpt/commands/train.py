"""`cpt train`: start a run, as `deepspeed cpt/run.py` does in the repository."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from cpt.commands import Commands
from cpt.commands.run_options import add_run_options

VALUES = {
    "num_gpus": "ranks on every node; without a GPU: number of processes",
    "num_nodes": "nodes of the host file to use",
    "hostfile": "file with lines such as 'node1 slots=8'",
    "include": "nodes and GPUs to use, such as 'node1@node2:0,2'",
    "exclude": "nodes and GPUs not to use",
    "master_addr": "address of the first node",
    "master_port": "port of the first node",
    "node_rank": "number of this node, with --no_ssh",
    "launcher": "how to reach other nodes: pdsh, openmpi, mpich, slurm, ...",
    "launcher_args": "options of that",
}
"""Options of the launcher that have a value, and their help; `deepspeed --help` tells more."""
FLAGS = {"no_ssh": "this command runs on every node; the nodes meet at --master_addr"}
"""Options of the launcher without a value."""


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "train", help="start a run: deepspeed cpt/run.py with these options", allow_abbrev=False
    )
    add_launcher_options(parser)
    add_run_options(parser)
    parser.set_defaults(run=_run)


def add_launcher_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that DeepSpeed's launcher takes."""
    for name, text in VALUES.items():
        parser.add_argument(f"--{name}", metavar=name.upper(), help=text)
    for name, text in FLAGS.items():
        parser.add_argument(f"--{name}", action="store_true", help=text)


def launch_command(words: list[str]) -> list[str]:
    """Return the command of the launcher for the words after `cpt train`."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_launcher_options(parser)
    found, run_words = parser.parse_known_args(words)
    command = [sys.executable, "-m", "deepspeed.launcher.runner"]
    for name in VALUES:
        value = getattr(found, name)
        if value is not None:
            command.append(f"--{name}={value}")
    for name in FLAGS:
        if getattr(found, name):
            command.append(f"--{name}")
    script = Path(__file__).resolve().parents[1] / "run.py"
    return [*command, str(script), *run_words]


def _run(options: argparse.Namespace) -> None:
    """Become the launcher, whose exit code is that of the run."""
    # --verbose and --quiet may stand before the subcommand
    at = options.words.index("train")
    command = launch_command(options.words[:at] + options.words[at + 1 :])
    sys.stdout.flush()
    os.execv(command[0], command)

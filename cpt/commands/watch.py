"""`cpt watch`: live pages of all runs of a folder."""

from __future__ import annotations

import argparse
from pathlib import Path

from cpt.commands import Commands
from data_pipeline.console.say import complain, say

LOOPBACK = "127.0.0.1"


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "watch", help="serve live pages of all runs of a folder; they only read"
    )
    parser.add_argument(
        "--root", type=Path, default=Path("runs"), help="folder of the runs, or one run directory"
    )
    parser.add_argument("--port", type=int, default=8765, help="0 takes a free one")
    parser.add_argument(
        "--host",
        default=LOOPBACK,
        help="address to listen on; others than the default can be reached from other machines",
    )
    parser.add_argument(
        "--depth", type=int, default=2, help="levels of folders below the root that may hold runs"
    )
    parser.add_argument(
        "--interval", type=float, default=5.0, help="seconds between two looks at the runs"
    )
    parser.add_argument(
        "--no_token",
        action="store_true",
        help="answer everybody who reaches the port; by default only who opens the printed address",
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    from cpt.errors import ConfigError
    from cpt.telemetry.watch.server import LOOPBACK as LOOPBACK_NAMES
    from cpt.telemetry.watch.server import serve

    if options.interval < 1 or options.depth < 0 or not 0 <= options.port < 65536:
        raise ConfigError("--interval is at least 1, --depth at least 0, --port below 65536.")
    if options.host not in LOOPBACK_NAMES and options.no_token:
        complain(
            f"--host {options.host}: whoever can reach this machine can read the state, the "
            "samples and the configuration of these runs.",
        )

    def told(address: str) -> None:
        say(f"watching {options.root}: {address} (Ctrl-C ends it)", flush=True)

    serve(
        options.root,
        host=options.host,
        port=options.port,
        depth=options.depth,
        interval_seconds=options.interval,
        needs_token=not options.no_token,
        told=told,
    )

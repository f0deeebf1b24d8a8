"""`cpt doctor`: tell what this machine can train with, and whether its attention is right."""

from __future__ import annotations

import argparse

from cpt.commands import Commands


def add_parser(commands: Commands) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "doctor", help="versions, devices, and which attention backends run here, or why not"
    )
    parser.add_argument(
        "--probe",
        action="store_true",
        help="instead, compare every usable attention backend with its definition in every dtype; "
        "exit code 70 if one is off",
    )
    sizes = parser.add_argument_group("layer that --probe computes; the defaults are gpt-oss")
    sizes.add_argument("--head_dim", type=int, default=64, help="size of a head")
    sizes.add_argument("--query_heads", type=int, default=64, help="query heads")
    sizes.add_argument("--kv_heads", type=int, default=8, help="key/value heads")
    sizes.add_argument(
        "--window", type=int, default=128, help="keys that a query of a window layer sees"
    )
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> None:
    if options.probe:
        from cpt.commands.doctor_probe import print_probes

        print_probes(options.head_dim, options.query_heads, options.kv_heads, options.window)
        return
    from cpt.commands.doctor_report import main

    main()

"""The `cpt` command: everything that is done with a run besides training it."""

from __future__ import annotations

import sys

from cpt.commands import (
    checkpoints,
    doctor,
    evaluate,
    export,
    guard,
    kl_targets,
    merge,
    plan,
    replay,
    report,
    sample,
    status,
    suite,
)
from cpt.errors import EXIT_DONE
from data_pipeline.commands import CommandParser, end_with_reason, prepare_process

COMMANDS = (
    export,
    merge,
    sample,
    report,
    status,
    checkpoints,
    guard,
    plan,
    evaluate,
    suite,
    replay,
    kl_targets,
    doctor,
)
"""In the order in which `cpt --help` lists them."""
RENAMED = {("guard", "replay"): ["guard", "audit"], ("replay", "targets"): ["kl_targets"]}
"""Deprecated words of two subcommands, and what they stand for."""


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand and return its exit code."""
    prepare_process()
    parser = CommandParser(
        prog="cpt", description="Continual pretraining of gpt-oss: before and after the run."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    options = parser.parse_args(_current_words(sys.argv[1:] if arguments is None else arguments))
    try:
        options.run(options)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        return end_with_reason(error, "cpt")
    return EXIT_DONE


def _current_words(arguments: list[str]) -> list[str]:
    """Replace the deprecated words of a subcommand and say so on stderr."""
    deprecated = tuple(arguments[:2])
    if deprecated not in RENAMED:
        return arguments
    words = RENAMED[deprecated]
    print(
        f"'cpt {' '.join(deprecated)}' is deprecated: use 'cpt {' '.join(words)}'.", file=sys.stderr
    )
    return [*words, *arguments[2:]]


if __name__ == "__main__":
    sys.exit(main())

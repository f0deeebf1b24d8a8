"""The `cpt` command: everything that is done with a run, training included.

Commands that compute with a model also run on all ranks of a launcher (cpt/offline/ranks.py):

    deepspeed --num_gpus 8 cpt/cli.py kl_targets ...
"""

from __future__ import annotations

import argparse
import os
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NoReturn

import argcomplete

ROOT = Path(__file__).resolve().parent.parent
if sys.path and Path(sys.path[0] or ".").resolve() == ROOT / "cpt":
    # the launcher puts cpt/ itself first, where `import config` would find a second copy
    sys.path[0] = str(ROOT)

from cpt.commands import (  # noqa: E402
    checkpoints,
    compare,
    data,
    doctor,
    evaluate,
    export,
    guard,
    import_adapter,
    init,
    kl_targets,
    merge,
    plan,
    replay,
    report,
    sample,
    stage,
    status,
    suite,
    train,
    watch,
)
from cpt.errors import EXIT_DONE, EXIT_INTERNAL, CptError  # noqa: E402
from cpt.resilience.environment import (  # noqa: E402
    is_launched,
    rank_of_environment,
    speaks_for_node,
)
from data_pipeline.commands import (  # noqa: E402
    CommandParser,
    end_with_reason,
    prepare_process,
    start_telling,
    with_home_folders,
)
from data_pipeline.console.say import complain, say  # noqa: E402

COMMANDS = (
    init,
    train,
    export,
    import_adapter,
    merge,
    sample,
    report,
    status,
    watch,
    compare,
    checkpoints,
    data,
    guard,
    plan,
    evaluate,
    suite,
    replay,
    kl_targets,
    stage,
    doctor,
)
"""In the order in which `cpt --help` lists them."""
VERSIONED = ("gpt-oss-cpt", "torch", "deepspeed", "transformers")
"""Packages whose versions `cpt --version` prints."""
RENAMED = {("guard", "replay"): ["guard", "audit"], ("replay", "targets"): ["kl_targets"]}
"""Deprecated words of two subcommands, and what they stand for."""


class Version(argparse.Action):
    """Prints the versions that a report of a fault should name."""

    def __init__(self, option_strings: list[str], dest: str, help: str) -> None:
        super().__init__(option_strings, dest=argparse.SUPPRESS, nargs=0, help=help)

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> NoReturn:
        for name in VERSIONED:
            try:
                say(f"{name} {version(name)}")
            except PackageNotFoundError:
                say(f"{name} (not installed)")
        parser.exit(EXIT_DONE)


def main(arguments: list[str] | None = None) -> int:
    """Run one subcommand and return its exit code."""
    prepare_process()
    parser = CommandParser(
        prog="cpt", description="Continual pretraining of gpt-oss: before and after the run."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_parser(commands)
    parser.add_argument("--version", action=Version, help="print versions and leave")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # given by deepspeed
    if "_ARGCOMPLETE" in os.environ:  # a shell asks how a command may go on
        argcomplete.autocomplete(parser)
    words = sys.argv[1:] if arguments is None else arguments
    words = _current_words(words)
    options = with_home_folders(parser.parse_args(words))
    options.words = words
    start_telling(options, rank_of_environment() if is_launched() else None)
    try:
        options.run(options)
        sys.stdout.flush()
    except (Exception, KeyboardInterrupt) as error:
        return _leave(error)
    return EXIT_DONE


def _leave(error: BaseException) -> int:
    """Tell what ended the command and return the exit code; a rank of a launcher ends here."""
    if not is_launched():
        return end_with_reason(error, "cpt")
    code = getattr(error, "exit_code", EXIT_INTERNAL)
    if not isinstance(error, CptError) or speaks_for_node():
        code = end_with_reason(error, "cpt")
    # a process group that broke in a collective may never shut down; the code must get out
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _current_words(arguments: list[str]) -> list[str]:
    """Replace the deprecated words of a subcommand and say so on stderr."""
    deprecated = tuple(arguments[:2])
    if deprecated not in RENAMED:
        return arguments
    words = RENAMED[deprecated]
    complain(f"'cpt {' '.join(deprecated)}' is deprecated: use 'cpt {' '.join(words)}'.")
    return [*words, *arguments[2:]]


if __name__ == "__main__":
    sys.exit(main())

"""`python -m data_pipeline`: build a data mix, and plan a run over it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipeline.build import build, default_build_dir
from data_pipeline.dataset import BuiltData
from data_pipeline.errors import CptError, DataError
from data_pipeline.plan import describe_build, make_plan
from data_pipeline.schema import load_mix

DEFAULT_ROOT = Path("data")
"""Where builds go that are given no place."""
EXIT_STORAGE = 74


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    options = _parser().parse_args(arguments)
    try:
        if options.command == "build":
            _build(options)
        else:
            _plan(options)
    except CptError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"{error.filename or 'storage'}: {error.strerror or error}.", file=sys.stderr)
        return EXIT_STORAGE
    return 0


def _build(options: argparse.Namespace) -> None:
    mix = load_mix(options.mix)
    out_dir = options.out or default_build_dir(mix, DEFAULT_ROOT)
    manifest = build(mix, out_dir)
    print(describe_build(manifest.sources))
    print(f"{out_dir}: manifest {manifest.hash[:16]}, fingerprint {manifest.fingerprint[:10]}")


def _plan(options: argparse.Namespace) -> None:
    mix = load_mix(options.mix)
    out_dir = options.out or default_build_dir(mix, DEFAULT_ROOT)
    build(mix, out_dir)
    plan = make_plan(BuiltData.open(out_dir, verify=False, mix=mix), mix, options.steps, options.global_batch_size)
    print(plan.describe())
    if plan.problems:
        raise DataError("\n".join(plan.problems))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m data_pipeline", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("build", "make the token shards and packed rows that training reads"),
        ("plan", "show tokens, epochs and language shares of a run; builds what is missing"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("mix", type=Path, metavar="MIX.yaml")
        command.add_argument("--out", type=Path, metavar="DIR", help="build directory (default: data/NAME-FINGERPRINT)")
        if name == "plan":
            command.add_argument("--steps", type=_positive, required=True, help="optimizer steps of the run")
            command.add_argument("--global_batch_size", type=_positive, required=True, help="packed rows per step")
    return parser


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


if __name__ == "__main__":
    sys.exit(main())

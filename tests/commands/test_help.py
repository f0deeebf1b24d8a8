"""`--help` of every command tells what each option is for and what it is by default."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

import pytest

from cpt.cli import COMMANDS
from cpt.run import parse_arguments
from data_pipeline.commands import CommandParser


def leaves(parser: argparse.ArgumentParser) -> Iterator[argparse.ArgumentParser]:
    """Yield the parsers below one that have no subcommands."""
    nested = [
        action for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    ]
    if not nested:
        yield parser
    for action in nested:
        for child in action.choices.values():
            yield from leaves(child)


def all_parsers() -> list[argparse.ArgumentParser]:
    parser = CommandParser(prog="cpt")
    commands = parser.add_subparsers()
    for command in COMMANDS:
        command.add_parser(commands)
    return list(leaves(parser))


PARSERS = all_parsers()


def has_default(action: argparse.Action) -> bool:
    default = action.default
    return default is not False and default not in (None, "", argparse.SUPPRESS, [])


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.prog.replace(" ", "_"))
def test_every_option_is_explained_with_its_default(parser: argparse.ArgumentParser) -> None:
    text = " ".join(parser.format_help().split())
    unexplained = []
    for action in parser._actions:
        if action.help is None:
            unexplained.append(action.dest)
        elif has_default(action) and action.option_strings:
            told = "default" in action.help or f"(default: {action.default})" in text
            if not told:
                unexplained.append(action.dest)
    assert unexplained == []


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.prog.replace(" ", "_"))
def test_every_command_can_be_quiet_or_verbose(parser: argparse.ArgumentParser) -> None:
    assert {"--quiet", "--verbose"} <= set(parser._option_string_actions)


def test_a_run_shows_its_defaults_and_can_be_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    text = capsys.readouterr().out
    assert "(default: auto)" in text and "--quiet" in text and "tiny.yaml" in text

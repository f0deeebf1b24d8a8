"""What all command lines of this project share: their parser, their start and their end."""

from __future__ import annotations

import argparse
import io
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from data_pipeline.console.log_lines import (
    add_verbosity,
    log_to_terminal,
    mute_libraries,
    verbosity_of,
)
from data_pipeline.console.say import complain
from data_pipeline.errors import EXIT_INTERNAL, ConfigError, explain, keep_trace
from data_pipeline.escaping import escaped_text
from data_pipeline.store.descriptors import raise_descriptor_limit


class HelpFormatter(argparse.HelpFormatter):
    """Shows the default of every option that has one, unless its text tells it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        if text is None or "default" in text or not action.option_strings:
            return text
        if action.default is False or action.default in (None, "", argparse.SUPPRESS, []):
            return text
        return f"{text} (default: %(default)s)"


class CommandParser(argparse.ArgumentParser):
    """A parser of this project, and of its subcommands: with `--quiet` and `--verbose`.

    It treats a wrong option as a bad configuration, as a run does.
    """

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        settings.setdefault("formatter_class", HelpFormatter)
        super().__init__(*arguments, **settings)
        add_verbosity(self)

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(ConfigError.exit_code, f"{self.prog}: {message}. {self.prog} --help helps.\n")

    def _print_message(self, message: str, file: Any = None) -> None:
        super()._print_message(escaped_text(message), file)


def with_home_folders(options: argparse.Namespace) -> argparse.Namespace:
    """Fill in `~` in the paths of a command line, which shells leave alone in `--option=~/x`."""
    for name, value in vars(options).items():
        if isinstance(value, Path):
            setattr(options, name, Path(os.path.expanduser(value)))
        elif isinstance(value, list) and value and isinstance(value[0], Path):
            setattr(options, name, [Path(os.path.expanduser(path)) for path in value])
    return options


def end_with_reason(error: BaseException, program: str) -> int:
    """Tell a person what ended a command, and return the exit code."""
    explained = explain(error)
    if explained is None:
        explained = keep_trace(error, program), EXIT_INTERNAL
    message, code = explained
    complain(message)
    try:
        sys.stdout.flush()
    except OSError:
        # whoever read the output is gone, or its disk is full: Python would try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def prepare_process() -> None:
    """Let no character that a terminal lacks, and no default limit on files, end a command, and let
    nobody else write to what it makes.
    """
    raise_descriptor_limit()
    # 002 is a common default; libraries, too, make files and folders in run directories
    os.umask(os.umask(0o022) | 0o022)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def start_telling(options: argparse.Namespace, rank: int | None = None) -> None:
    """Log to the terminal as much as a command line asks for; see `console.log_lines`.

    Args:
        options: The command line.
        rank: Rank of this process; None for one that has no place among ranks.
    """
    log_to_terminal(verbosity_of(options), rank=rank)
    mute_libraries(verbosity_of(options))

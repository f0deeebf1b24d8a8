"""What all command lines of this project share: their parser, their start and their end."""

from __future__ import annotations

import argparse
import io
import os
import sys
from typing import NoReturn

from data_pipeline.errors import EXIT_INTERNAL, ConfigError, explain, keep_trace
from data_pipeline.store.descriptors import raise_descriptor_limit


class CommandParser(argparse.ArgumentParser):
    """A parser that treats a wrong option as a bad configuration, as a run does."""

    def error(self, message: str) -> NoReturn:
        self.print_usage(sys.stderr)
        self.exit(ConfigError.exit_code, f"{self.prog}: {message}. {self.prog} --help helps.\n")


def end_with_reason(error: BaseException, program: str) -> int:
    """Tell a person what ended a command, and return the exit code."""
    explained = explain(error)
    if explained is None:
        explained = keep_trace(error, program), EXIT_INTERNAL
    message, code = explained
    print(message, file=sys.stderr)
    try:
        sys.stdout.flush()
    except OSError:
        # whoever read the output is gone, or its disk is full: Python would try again at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return code


def prepare_process() -> None:
    """Let no character that a terminal lacks, and no default limit on files, end a command."""
    raise_descriptor_limit()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")

"""The one way onto stdout and stderr, but for log lines and progress bars."""

from __future__ import annotations

import sys

from data_pipeline.escaping import escaped_text


def say(text: str, *, flush: bool = False) -> None:
    """Print what a command was asked for, on stdout; see `escaping` for what a text may hold."""
    print(escaped_text(text), flush=flush)


def complain(text: str, *, flush: bool = False) -> None:
    """Print what a person must know beside the result, on stderr."""
    print(escaped_text(text), file=sys.stderr, flush=flush)

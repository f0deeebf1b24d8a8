"""The one way onto stdout and stderr, but for log lines and progress bars."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable

from data_pipeline.escaping import escaped_text


def say(text: str, *, flush: bool = False) -> None:
    """Print what a command was asked for, on stdout; see `escaping` for what a text may hold."""
    print(escaped_text(text), flush=flush)


def complain(text: str, *, flush: bool = False) -> None:
    """Print what a person must know beside the result, on stderr."""
    print(escaped_text(text), file=sys.stderr, flush=flush)


def say_marked(pieces: Iterable[tuple[str, bool]]) -> None:
    """Print a text whose marked pieces are green on a terminal, and in [[ ]] elsewhere.

    Args:
        pieces: (text, whether it is marked) in order. A terminal gets brackets, too, if NO_COLOR is
            set.
    """
    begin = "[["
    end = "]]"
    if sys.stdout.isatty() and not os.environ.get("NO_COLOR"):
        begin = "\x1b[32m"
        end = "\x1b[0m"
    text = ""
    for piece, is_marked in pieces:
        shown = escaped_text(piece)
        text += f"{begin}{shown}{end}" if is_marked else shown
    print(text)

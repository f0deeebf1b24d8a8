"""How far a long command is: a bar on a terminal, a log line now and then anywhere else.

A job log that holds a bar is one endless line of carriage returns.  So a bar is drawn only where
stderr is a terminal.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Protocol, Self

from data_pipeline.console.log_lines import terminal_shows
from data_pipeline.escaping import escaped_line

SECONDS_BETWEEN_LINES = 30.0
"""Least time between two log lines about the same work."""

log = logging.getLogger("data_pipeline.progress")


class ProgressBar(Protocol):
    """How far some work is, as people see it; a context manager."""

    n: float
    """Units done."""

    def update(self, n: float | None = 1) -> object:
        """Add units that were done."""

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """Show a text behind the figures."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def show_progress(
    total: float | None,
    what: str,
    unit: str,
    *,
    initial: float = 0,
    unit_scale: bool = False,
    hidden: bool = False,
    lines: bool = True,
    leave: bool = True,
) -> ProgressBar:
    """Return what shows the progress of some work.

    Args:
        total: Units of the whole work; None if nobody knows.
        what: Name of the work.
        unit: A unit, for people: row, text, B.
        initial: Units that were done before.
        unit_scale: Shorten large numbers by k, M, G.
        hidden: Show nothing, as on ranks other than the first.
        lines: Where there is no terminal, write log lines.
        leave: The bar stays on the terminal when the work is done.
    """
    what = escaped_line(what)
    if hidden or not terminal_shows(logging.INFO):
        return ProgressLines(None, unit, initial=initial, tell=None)
    if sys.stderr.isatty():
        from tqdm import tqdm  # reads the variables of `log_lines.mute_libraries` when imported

        return tqdm(
            total=total,
            initial=initial,
            desc=what,
            unit=unit,
            unit_scale=unit_scale,
            disable=False,  # a user may have set TQDM_DISABLE for other programs
            leave=leave,
            delay=0 if leave else 1,  # seconds: what is over sooner does not flicker
        )
    return ProgressLines(
        total,
        unit,
        what=what,
        initial=initial,
        unit_scale=unit_scale,
        tell=log.info if lines else None,
    )


class ProgressLines:
    """Tells in log lines how far some work is: after half a minute, and again every half minute.

    Work that takes less than that is not worth a line.
    """

    def __init__(
        self,
        total: float | None,
        unit: str,
        *,
        what: str = "",
        initial: float = 0,
        unit_scale: bool = False,
        tell: Callable[[str], None] | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.n = initial
        self._total = total
        self._unit = unit
        self._what = what
        self._initial = initial
        self._unit_scale = unit_scale
        self._tell = tell
        self._clock = clock
        self._started = self._told_at = clock()
        self._told: float | None = None
        """Units done when the last line was written."""
        self._postfix = ""

    def update(self, n: float | None = 1) -> None:
        """Add units that were done."""
        self.n += n or 0
        self._tell_if_due()

    def set_postfix_str(self, s: str = "", refresh: bool = True) -> None:
        """Take a text that stands behind the figures."""
        self._postfix = s
        if refresh:
            self._tell_if_due()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._told is not None and self._told != self.n:
            self._write(self._clock())

    def _tell_if_due(self) -> None:
        now = self._clock()
        if now - self._told_at >= SECONDS_BETWEEN_LINES:
            self._write(now)

    def _write(self, now: float) -> None:
        self._told_at = now
        self._told = self.n
        if self._tell is None:
            return
        from tqdm import tqdm

        line = tqdm.format_meter(
            n=self.n,
            total=self._total,  # type: ignore[arg-type]
            elapsed=now - self._started,
            unit=self._unit,
            unit_scale=self._unit_scale,
            initial=self._initial,
            prefix=self._what,
            postfix=self._postfix or None,
            bar_format=self._form(),
        )
        self._tell(" ".join(line.split()))  # tqdm pads its figures

    def _form(self) -> str:
        """Return the form of a line, in the words of tqdm's `bar_format`."""
        unit = "B" if self._unit == "B" else ""
        units = "" if unit else f" {_plural(self._unit)}"
        if not self._total:
            return f"{{desc}}: {{n_fmt}}{unit}{units}, {{rate_fmt}}, {{elapsed}} so far{{postfix}}"
        return (
            f"{{desc}}: {{n_fmt}}{unit} of {{total_fmt}}{unit}{units}, {{percentage:.0f}} %, "
            "{rate_fmt}, {elapsed} so far, {remaining} left{postfix}"
        )


def _plural(unit: str) -> str:
    """Return the English plural of a noun, as far as the units here need it."""
    if unit.endswith(("ch", "s")):
        return f"{unit}es"
    if unit.endswith("y"):
        return f"{unit[:-1]}ies"
    return f"{unit}s"

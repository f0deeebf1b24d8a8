"""How a start of a run ended, as a fact that other programs read.

    metrics.jsonl        one `end` event for every end that could still be written
    last_failure.json    the newest end that was a failure; job scripts read it; a start removes it

Decisions
    The first record of a failure holds: peers that fail in its wake write nothing.
    The event is one write to a file that is open for appending, so that it is a line of its own
    also beside a process that hangs with the same file open.
"""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from cpt.resilience.environment import node_name
from cpt.telemetry.metrics import append_bytes
from data_pipeline.bounded.json_text import read_json
from data_pipeline.store.files import no_links

METRICS = "metrics.jsonl"
LAST_FAILURE = "last_failure.json"
LONGEST_CAUSE = 1000
"""Characters of a cause that are kept."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EndRecord:
    """The end of one start of a run."""

    exit_code: int
    """What the ranks that could still choose ended with."""
    cause: str
    """Why, in one line."""
    step: int
    """Optimizer steps done."""
    rank: int = 0
    """The rank that it was due to; 0 for what all ranks agreed on."""
    host: str = field(default_factory=socket.gethostname)
    """Host name of that rank's machine."""
    node: str = field(default_factory=node_name)
    """What the batch system calls this machine."""
    signal: int = 0
    """The signal that killed the rank; 0 if none did."""
    time: float = field(default_factory=time.time)
    """Unix time."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "cause", one_line(self.cause)[:LONGEST_CAUSE])

    def event(self) -> dict[str, Any]:
        """Return the event for metrics.jsonl."""
        event: dict[str, Any] = {
            "event": "end",
            "step": self.step,
            "time": self.time,
            "exit_code": self.exit_code,
            "cause": self.cause,
        }
        if self.exit_code:
            event |= {
                "rank": self.rank,
                "host": self.host,
                "node": self.node,
                "signal": self.signal,
            }
        return event


def finish_time(events: Iterable[Mapping[str, Any]]) -> float | None:
    """Return when a run first reached the end that holds now, as Unix time; None if unknown.

    Args:
        events: All events of the run in order.
    """
    found = None
    for event in events:
        if event.get("event") == "step":
            found = None
        elif event.get("event") == "end" and event.get("exit_code", 0) == 0 and found is None:
            found = event.get("time")
    return found if isinstance(found, float) else None


def has_last_look(events: Iterable[Mapping[str, Any]], step: int) -> bool:
    """Return whether the guard measured the weights that a run ended with, as those of its end.

    A look of the same step on the way has other bounds, and one before the newest step may be of
    weights that the run has left.

    Args:
        events: All events of the run in order.
        step: Optimizer steps done.
    """
    found = False
    for event in events:
        if event.get("event") == "step":
            found = False
        elif event.get("event") == "guard_decision" and event.get("step") == step:
            found = found or bool(event.get("last"))
    return found


def one_line(text: str) -> str:
    """Return the first line of a text, with the number of those that follow."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if len(lines) <= 1:
        return "".join(lines)
    left = len(lines) - 1
    return f"{lines[0]} ({left} more line{'s' if left > 1 else ''})"


def append_event(run_dir: Path, event: Mapping[str, Any]) -> None:
    """Append one line to metrics.jsonl, past whatever else has the file open.

    Raises:
        OSError: it cannot be written.
    """
    line = json.dumps(event, allow_nan=False) + "\n"
    append_bytes(run_dir / METRICS, line.encode("ascii"))


def record_failure(run_dir: Path, end: EndRecord) -> bool:
    """Write last_failure.json and the event of a failure, unless this start has failed before.

    Returns:
        Whether this is the first record.

    Raises:
        OSError: it cannot be written.
    """
    path = run_dir / LAST_FAILURE
    temporary = run_dir / f".{LAST_FAILURE}.{secrets.token_hex(4)}"
    with open(temporary, "x", encoding="utf-8", opener=no_links) as file:
        file.write(json.dumps(asdict(end), indent=2) + "\n")
    try:
        os.link(temporary, path)  # fails if the name is taken, unlike a rename
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if path.exists():
            return False
        temporary.rename(path)
    finally:
        temporary.unlink(missing_ok=True)
    append_event(run_dir, end.event())
    return True


def forget_failure(run_dir: Path) -> None:
    """Remove what an earlier start left; its event stays in metrics.jsonl."""
    (run_dir / LAST_FAILURE).unlink(missing_ok=True)


def read_failure(run_dir: Path) -> EndRecord | None:
    """Return how the newest start of a run failed; None if it did not, or if it cannot be read."""
    try:
        return EndRecord(**read_json(run_dir / LAST_FAILURE, follow_links=False))
    except (OSError, ValueError, TypeError, AttributeError):
        return None

"""Run directories as runs of each state leave them, made by hand."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cpt.resilience.lock import LOCK, Holder, this_process
from tests.support.records import write_jsonl
from tests.support.run_events import step

CONFIG = "train: {total_steps: 30}\nguard: {tolerance_percent: 1.0}\n"
STARTED = 1.8e9
"""Unix time of a start."""
PAUSE = {"event": "guard_decision", "step": 4, "action": "pause", "reason": "english lost 2 %"}


def steps(first: int, last: int) -> list[dict[str, Any]]:
    """Return the events of some optimizer steps."""
    return [step(number) for number in range(first, last + 1)]


def falling_steps(first: int, last: int, *, tokens: int = 1000) -> list[dict[str, Any]]:
    """Return the events of some optimizer steps whose loss falls and whose rate rises."""
    events = []
    for number in range(first, last + 1):
        changes = {"loss": 4.0 - 0.05 * number, "lr": 1e-5 * number, "tokens": tokens}
        sources = {"ja_web": 0.6 * tokens, "en_web": 0.4 * tokens}
        events.append(step(number, tokens_by_source=sources, **changes))
    return events


def make_run(
    folder: Path, *events: dict[str, Any], saved: int | None = None, config: str = CONFIG
) -> Path:
    """Fill a run directory as a run would leave it.

    Args:
        folder: The run directory.
        events: Lines of metrics.jsonl.
        saved: Step of the only checkpoint; None for none.
        config: Text of config.resolved.yaml.
    """
    folder.mkdir(exist_ok=True, parents=True)
    write_jsonl(folder / "metrics.jsonl", events)
    (folder / "config.resolved.yaml").write_text(config)
    if saved is not None:
        checkpoint = folder / "checkpoints" / f"step-{saved:08d}"
        checkpoint.mkdir(parents=True)
        (checkpoint / "manifest.json").write_text("{}")
    return folder


def leave_lock(folder: Path, age_seconds: float = 0.0, **changes: Any) -> None:
    """Leave the lock of this process, or of another."""
    holder: dict[str, Any] = {**asdict(this_process()), **changes}
    path = folder / LOCK
    path.write_text(json.dumps(asdict(Holder(**holder))))
    refreshed = time.time() - age_seconds
    os.utime(path, (refreshed, refreshed))

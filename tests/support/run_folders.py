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

CONFIG = "train: {total_steps: 30}\nguard: {tolerance_percent: 1.0}\n"
STARTED = 1_700_000_000.0
PAUSE = {"event": "guard_decision", "step": 4, "action": "pause", "reason": "english lost 2 %"}


def start(step: int = 0, at: float = STARTED) -> dict[str, Any]:
    """Return the event of a start."""
    return {"event": "start", "step": step, "time": at, "start_up_seconds": 1.0}


def step(number: int, **changes: Any) -> dict[str, Any]:
    """Return the event of an optimizer step."""
    event = {"event": "step", "step": number, "loss": 3.0, "tokens": 1000, "seconds": 2.0}
    return {**event, **changes}


def steps(first: int, last: int) -> list[dict[str, Any]]:
    """Return the events of some optimizer steps."""
    return [step(number) for number in range(first, last + 1)]


def full_steps(first: int, last: int, *, tokens: int = 1000) -> list[dict[str, Any]]:
    """Return the events of some optimizer steps with all that charts show."""
    events = []
    for number in range(first, last + 1):
        events.append(
            step(
                number,
                loss=4.0 - 0.05 * number,
                lr=1e-5 * number,
                grad_norm=0.5,
                tokens=tokens,
                tokens_per_second=tokens / 2.0,
                loss_by_language={"ja": 3.5, "en": 2.5},
                tokens_by_source={"ja_web": 0.6 * tokens, "en_web": 0.4 * tokens},
            )
        )
    return events


def guard(number: int, percent: float, domain: str = "english") -> dict[str, Any]:
    """Return one measurement of a domain of held-out text."""
    event = {"event": "guard", "kind": "text", "step": number, "domain": domain, "language": "en"}
    interval = {"ci_low": percent - 0.2, "ci_high": percent + 0.2}
    return {**event, **interval, "delta_percent": percent, "state": "green", "action": "none"}


def end(number: int, **changes: Any) -> dict[str, Any]:
    """Return the event of an orderly end."""
    return {"event": "end", "step": number, "time": STARTED + 100, **changes}


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

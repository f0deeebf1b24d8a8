"""Shows events to the trackers of a run directory, as several starts of a run do.

    python -m tests.support.tracked_starts RUN_DIR STARTS.json

STARTS.json is a list with one object per start: `telemetry` (that section), `events`, and perhaps
`environment`, variables that hold from then on, and `signal`, which the service of W&B gets once it
records.  Each start prints a line of
JSON: how long it took to hand over the events, and to close.  The libraries change the process that
they run in, so tests call this in one of its own.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cpt.config import TelemetrySection
from cpt.telemetry.trackers import trackers_for
from cpt.telemetry.wandb_tracker import service_pids

CLOSE_SECONDS = 20.0


@dataclass(frozen=True, kw_only=True)
class PlainConfig:
    """As much of a RunConfig as trackers look at."""

    telemetry: TelemetrySection

    def to_plain(self) -> dict[str, Any]:
        """Return the configuration that trackers show."""
        return {"train": {"lr": 1e-3}, "telemetry": {"wandb": self.telemetry.wandb}}


def run_start(run_dir: Path, start: dict[str, Any]) -> dict[str, float]:
    """Show the events of one start and return the seconds that training would have waited."""
    os.environ.update(start.get("environment", {}))
    section = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in start["telemetry"].items()
    }
    config = PlainConfig(telemetry=TelemetrySection(**section))
    is_hurt = "signal" in start
    is_stopped = start.get("signal") == signal.SIGSTOP
    trackers = trackers_for(config, run_dir, 3.0 if is_stopped else CLOSE_SECONDS)  # type: ignore[arg-type]
    if is_hurt:
        for pid in wait_for_service():
            os.kill(pid, start["signal"])
    began = time.monotonic()
    for event in start["events"]:
        for tracker in trackers:
            tracker.log(event)
    logged = time.monotonic()
    for tracker in trackers:
        tracker.close()
    return {"log_seconds": logged - began, "close_seconds": time.monotonic() - logged}


def wait_for_service() -> list[int]:
    """Return the services of W&B once a start is open."""
    deadline = time.monotonic() + 60
    while getattr(sys.modules.get("wandb"), "run", None) is None:
        assert time.monotonic() < deadline, "W&B does not record"
        time.sleep(0.05)
    return service_pids()


if __name__ == "__main__":
    folder, plan = Path(sys.argv[1]), Path(sys.argv[2])
    for one in json.loads(plan.read_text(encoding="utf-8")):
        print(json.dumps(run_start(folder, one)), flush=True)

"""The line of the log about an optimizer step, such as

    step 120/2000: loss 2.3151, 13,512 tokens/s, 4:51:07 left, peak memory 49.1 GiB (GPU), ...

It is written after the first step of a start, every `telemetry.log_interval_steps` steps, and after
the last one, on the first rank.  Tokens per second are those of all ranks since the line before;
the time left follows the pace of the last `PACE_STEPS` steps with the saves and measurements
between them.
"""

from __future__ import annotations

import datetime
import logging
import math
import time
from collections import deque
from collections.abc import Callable
from typing import Any

PACE_STEPS = 100
"""Steps that the time left is reckoned from."""

log = logging.getLogger("cpt.job.step_lines")


class StepLines:
    """Writes the lines of one start of a run."""

    def __init__(
        self,
        *,
        first_step: int,
        last_step: int,
        interval_steps: int,
        memory_kind: str,
        goodput: Callable[[], float],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Begin to measure.

        Args:
            first_step: Optimizer steps done when this start began.
            last_step: The step after which the run ends.
            interval_steps: Steps between two lines; 0 for no line.
            memory_kind: What `peak_memory_bytes` of a step counts, for people.
            goodput: Returns the productive share of all time so far, 0 to 1; NaN if unknown.
            clock: Returns seconds.
        """
        self._first_step = first_step
        self._last_step = last_step
        self._interval_steps = interval_steps
        self._memory_kind = memory_kind
        self._goodput = goodput
        self._clock = clock
        self._slots = 0
        self._seconds = 0.0
        self._times: deque[tuple[int, float]] = deque([(first_step, clock())], PACE_STEPS + 1)

    def take(self, event: dict[str, Any]) -> None:
        """Take the event of a step, as `step_event` returns it, and write a line if one is due."""
        step = event["step"]
        if step <= self._times[-1][0]:  # a rollback: the pace begins anew
            self._times.clear()
        self._times.append((step, self._clock()))
        self._slots += event["slots"]
        self._seconds += event["seconds"]
        if not self._is_due(step):
            return
        log.info("%s", self._line(event))
        self._slots = 0
        self._seconds = 0.0

    def _is_due(self, step: int) -> bool:
        if self._interval_steps == 0:
            return False
        is_end = step in (self._first_step + 1, self._last_step)
        return is_end or step % self._interval_steps == 0

    def _line(self, event: dict[str, Any]) -> str:
        parts = [
            f"loss {event['loss']:.4f}",
            f"{self._slots / self._seconds:,.0f} tokens/s",
            f"{self._time_left(event['step'])} left",
            f"peak memory {event['peak_memory_bytes'] / 2**30:.1f} GiB ({self._memory_kind})",
        ]
        if event["tokens"] < event["slots"]:  # loss masks
            parts[0] += f" over {100 * event['tokens'] / event['slots']:.0f} % of the tokens"
        if "utilization" in event:
            parts.append(f"utilization {100 * event['utilization']:.1f} %")
        goodput = self._goodput()
        if math.isfinite(goodput):
            parts.append(f"goodput {100 * goodput:.1f} %")
        return f"step {event['step']}/{self._last_step}: {', '.join(parts)}"

    def _time_left(self, step: int) -> str:
        first_step, began = self._times[0]
        if step <= first_step:
            return "an unknown time"
        seconds = (self._clock() - began) * (self._last_step - step) / (step - first_step)
        return str(datetime.timedelta(seconds=round(seconds)))

"""What a stage is: a function with a name, a time that it needs, and a result on disk."""

from __future__ import annotations

import gc
import importlib
import json
import os
import statistics
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring
import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The command line."""

    out: Path
    """Folder of the results."""
    deadline: float
    """Unix time at which everything must have ended."""
    tiny: bool
    """Whether toy sizes run on a CPU."""
    only: list[str] | None = None
    """Stages whose name contains one of these; None for all."""
    group: str | None = None
    """Group that this process runs; None in the parent."""

    @property
    def device(self) -> torch.device:
        """The device that is measured."""
        return torch.device("cpu") if self.tiny else torch.device("cuda", 0)

    @property
    def seconds_left(self) -> float:
        """Time until the deadline."""
        return self.deadline - time.time()

    def size(self, true: int, toy: int) -> int:
        """Return a true size, or a toy's."""
        return toy if self.tiny else true


Stage = Callable[[Options], Any]


@dataclass(frozen=True, slots=True)
class Planned:
    """A stage in the order of its group."""

    run: Stage
    """The function; its result is JSON."""
    needed_seconds: float
    """Time that must be left for it to start."""


def run_stages(options: Options, module_name: str, names: tuple[str, ...]) -> None:
    """Run stages of a module, all if no names are given, and write each result at once."""
    started = time.perf_counter()
    module = importlib.import_module(f"gpu.stages_{module_name}")
    print(f"imports: {time.perf_counter() - started:.1f} s", flush=True)
    for stage in module.STAGES:
        name = stage.run.__name__
        if names and name not in names:
            continue
        if options.only and not any(word in name for word in options.only):
            continue
        if options.seconds_left < stage.needed_seconds:
            record(options, name, "skipped", 0.0, f"{options.seconds_left:.0f} s left")
            continue
        started = time.perf_counter()
        try:
            result, state = stage.run(options), "ok"
        except Exception as error:
            traceback.print_exc()
            result, state = f"{type(error).__name__}: {error}"[:2000], "FAILED"
        record(options, name, state, time.perf_counter() - started, result)
        gc.collect()
        if not options.tiny:
            torch.cuda.empty_cache()


def record(options: Options, name: str, state: str, seconds: float, result: Any) -> None:
    """Append a result to results.jsonl, and print it in short."""
    line = {
        "group": options.group,
        "stage": name,
        "state": state,
        "seconds": round(seconds, 2),
        "result": result,
    }
    with open(options.out / "results.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps(line, default=str) + "\n")
        file.flush()
        os.fsync(file.fileno())
    shown = json.dumps(result, default=str)
    print(f"--- {name}: {state} in {seconds:.1f} s: {shown[:1200]}", flush=True)


def synchronize(options: Options) -> None:
    """Wait for the device."""
    if not options.tiny:
        torch.cuda.synchronize()


def milliseconds(
    step: measuring.Step, options: Options, *, rounds: int = 5, warm_up: int = 2
) -> float:
    """Return the median time of one call, the device's work included."""
    for _ in range(warm_up):
        step()
    times = []
    for _ in range(rounds):
        times.append(1e3 * measuring.seconds(step, options.device, "wall"))
    return statistics.median(times)


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    """Return the l2 norm of the difference over that of `want`, in float64."""
    difference = (got.double() - want.double()).norm()
    return float(difference / want.double().norm().clamp(min=1e-300))

"""What a stage is: a function with a name, a time that it needs, and a result on disk."""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import math
import os
import signal
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import measuring
import torch

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS_TO_END = 5
"""Time that a stopped program has to stop what it has started."""


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


def run_stages(options: Options, module_name: str, names: tuple[str, ...]) -> bool:
    """Run stages of a module, all if no names are given, and write each result at once.

    Returns:
        Whether none of them failed or found anything wrong.
    """
    started = time.perf_counter()
    module = importlib.import_module(f"gpu.stages_{module_name}")
    print(f"imports: {time.perf_counter() - started:.1f} s", flush=True)
    all_right = True
    for stage in module.STAGES:
        name = stage.run.__name__
        if names and name not in names:
            continue
        if options.only and not any(word in name for word in options.only):
            continue
        if options.seconds_left < stage.needed_seconds:
            record(options, name, "skipped", 0.0, f"{options.seconds_left:.0f} s left")
            continue
        all_right = _run_stage(options, stage) and all_right
    return all_right


def _run_stage(options: Options, stage: Planned) -> bool:
    """Run one stage, write its result, and return whether all is right."""
    name = stage.run.__name__
    started = time.perf_counter()
    try:
        result, state = stage.run(options), "ok"
        if not options.tiny:
            torch.cuda.synchronize()  # an error inside a kernel is the stage's own
    except Exception as error:
        traceback.print_exc()
        result, state = f"{type(error).__name__}: {error}"[:2000], "FAILED"
    wrong = list(wrong_places(result))
    if wrong and state == "ok":
        state = "WRONG"
    record(options, name, state, time.perf_counter() - started, result)
    if wrong:
        print(f"!!! {name}: {'; '.join(wrong)}", flush=True)
    gc.collect()
    if not options.tiny:
        # after an error inside a kernel, this raises, too
        with contextlib.suppress(RuntimeError):
            torch.cuda.empty_cache()
    return state == "ok"


def wrong_places(result: Any, place: str = "") -> Iterator[str]:
    """Yield what a result says that it must not: False, no finite number, FAILED, an exit code."""
    if isinstance(result, dict):
        for name, value in result.items():
            inside = f"{place}/{name}" if place else str(name)
            if name == "code":
                if value != 0:
                    yield f"{inside}: {value}"
            else:
                yield from wrong_places(value, inside)
    elif isinstance(result, list | tuple):
        for index, value in enumerate(result):
            yield from wrong_places(value, f"{place}[{index}]")
    elif _is_wrong(result):
        yield f"{place}: {result}"


def _is_wrong(value: Any) -> bool:
    if isinstance(value, float):
        return not math.isfinite(value)
    return value is False or (isinstance(value, str) and value.startswith("FAILED"))


def record(
    options: Options,
    name: str | None,
    state: str,
    seconds: float,
    result: Any,
    group: str | None = None,
) -> None:
    """Append a result to results.jsonl, and print it in short.

    Args:
        options: The command line.
        name: The stage; None for a whole group.
        state: ok, WRONG, FAILED, skipped or stopped.
        seconds: How long it took.
        result: Anything that JSON has.
        group: The group, if it is not the one of this process.
    """
    line = {
        "group": group or options.group,
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
    print(f"--- {name or group}: {state} in {seconds:.1f} s: {shown[:1200]}", flush=True)


def run_within(command: list[str], seconds: float, **settings: Any) -> int | None:
    """Run a program in the repository.

    At its end its session is killed, whatever it has started there: on a GPU it would slow down
    what comes next. What it has started in other sessions it must end itself, at a SIGTERM.

    Args:
        command: The program and its arguments.
        seconds: Time after which it is killed.
        **settings: Further arguments of `subprocess.Popen`.

    Returns:
        The exit code; None if the time was up.
    """
    process = subprocess.Popen(command, cwd=ROOT, start_new_session=True, **settings)
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        end_with_all_it_started(process)


def end_with_all_it_started(process: subprocess.Popen[Any]) -> None:
    """End a process that leads a session, and all processes there."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=SECONDS_TO_END)
    process.wait()


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

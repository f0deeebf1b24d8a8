"""Measure what measuring the routers costs a training step (telemetry.router_interval_steps).

    python bench/router.py [--lengths 1024 4096] [--rounds 2] [--experts 32] [--layers 4]
        [--json FILE]

The model is that of bench/step.py (hidden 512, 8 heads, experts of 384, top 4).  It trains in this
project's engine with ZeRO-3, one process, one packed row, AdamW and bf16.  Everything is measured
that a run measures: load by source, entropy, both losses, drift from the untouched routers, the
sums over ranks and the line of JSON.

The same steps give two figures.  The first is the time inside the measuring code over that of the
rest of the step; the share at the default interval follows from it.  The second is the median over
the rounds of a measuring step's time over that of a plain step just before or after it, which
contains the noise of both.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import measuring  # noqa: E402
from step_parts.cases import OURS, Case, row  # noqa: E402
from step_parts.ours import build  # noqa: E402

from cpt.config.sections import TelemetrySection  # noqa: E402
from cpt.telemetry.router import router_event  # noqa: E402
from cpt.training.loader import make_micro_batch  # noqa: E402
from cpt.training.original_router import watch_drift  # noqa: E402

INTERVAL = TelemetrySection().router_interval_steps


class Stopwatch:
    """The time spent inside chosen functions, in seconds."""

    def __init__(self, clock: str) -> None:
        self.read = time.process_time if clock == "cpu" else time.perf_counter
        self.seconds = 0.0

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return the function with its time added to `seconds`."""

        @functools.wraps(function)
        def timed(*args: Any, **kwargs: Any) -> Any:
            started = self.read()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds += self.read() - started

        return timed


class Trainer:
    """An engine that takes steps with and without measuring."""

    def __init__(self, case: Case) -> None:
        self._case = case
        self._number = 0
        self._engine, self._topology = build(case)
        with tempfile.TemporaryDirectory() as folder:
            watch_drift(self._engine, Path(folder), untouched=True)
        self.stopwatch = Stopwatch(case.clock)
        watch = self._engine.router_watch
        for name in ("begin", "_count", "computed", "finish"):
            setattr(watch, name, self.stopwatch.around(getattr(watch, name)))
        self._event = self.stopwatch.around(_line_of_event)

    def step(self, tokens: int, *, measure: bool) -> tuple[float, float]:
        """Return the seconds of one step, and those of its measuring."""
        self._number += 1
        packed = row(replace(self._case, tokens=tokens), self._number)
        batch = make_micro_batch([packed], [0], self._topology)
        predicted = [int((packed.labels >= 0).sum()), 0]
        self.stopwatch.seconds = 0.0
        started = self.stopwatch.read()
        result = self._engine.step([batch], predicted, step=self._number, measure_routers=measure)
        if result.router is not None:
            self._event(self._number, result.router, ["ja", "en"])
        return self.stopwatch.read() - started, self.stopwatch.seconds


def _line_of_event(*given: Any) -> str:
    return json.dumps(router_event(*given))


def main(arguments: list[str] | None = None) -> None:
    """Print a line per length, and write the figures if asked."""
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    # DeepSpeed's own calls
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed")
    os.environ.update(measuring.single_process())
    case = Case(
        contender=OURS,
        tokens=max(options.lengths),
        ranks=1,
        steps=options.rounds,
        threads=options.threads,
        experts=options.experts,
        layers=options.layers,
        clock=options.clock,
    )
    trainer = Trainer(case)
    results = []
    for tokens in options.lengths:
        results.append(measure(trainer, tokens, options.rounds))
        print(line_of(results[-1]), flush=True)
    measuring.publish({"machine": machine(options), "results": results}, options)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser()
    parser.add_argument(
        "--lengths", type=int, nargs="+", default=[1024, 4096], help="tokens of a row"
    )
    parser.add_argument("--experts", type=int, default=32)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock", choices=["wall", "cpu"], default="cpu", help="cpu: CPU seconds of the process"
    )
    parser.add_argument("--json", type=Path)
    return parser.parse_args(arguments)


def measure(trainer: Trainer, tokens: int, rounds: int) -> dict[str, Any]:
    """Time steps in pairs, with the measuring step first in every other pair."""
    trainer.step(tokens, measure=True)
    plain = []
    measuring_steps = []
    inside = []
    for number in range(rounds):
        order = (True, False) if number % 2 else (False, True)
        for measured in order:
            seconds, spent = trainer.step(tokens, measure=measured)
            if measured:
                measuring_steps.append(seconds)
                inside.append(spent)
            else:
                plain.append(seconds)
    pairs = list(zip(inside, measuring_steps, strict=True))
    share = statistics.median(spent / (whole - spent) for spent, whole in pairs)
    times = {"plain": plain, "measuring": measuring_steps}
    return {
        "tokens": tokens,
        "step seconds": statistics.median(plain),
        "measuring seconds": statistics.median(inside),
        "share of a measured step": share,
        "share at the default interval": share / INTERVAL,
        "measuring step over plain step": measuring.median_ratios(times, "plain")["measuring"],
    }


def line_of(result: dict[str, Any]) -> str:
    """Return a row of the table."""
    return (
        f"{result['tokens']:>6} tokens: step {result['step seconds']:.2f} s, measuring "
        f"{1e3 * result['measuring seconds']:.1f} ms = "
        f"{result['share of a measured step']:.2%} of a measured step, "
        f"{result['share at the default interval']:.4%} at an interval of {INTERVAL}; "
        f"measuring step / plain step {result['measuring step over plain step']:.3f}"
    )


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Return where the figures come from."""
    return {
        **measuring.origin(torch.device("cpu"), options),
        "model": f"{options.layers} layers, {options.experts} experts, hidden 512, top 4",
        "interval": INTERVAL,
    }


if __name__ == "__main__":
    main()

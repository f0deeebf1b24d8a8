"""Measure how often a guard says "kept" of a model that no longer does what it did.

    python bench/prove/guard_behavior.py [--work_dir DIR] [--smoke] [--arms ...]
        [--bases ...] [--orders ...] [--report] [--add FILE ...] [--json FILE] [--svg FILE]

A small gpt-oss learns English, Japanese and three tasks with answers that a program can check, in
the Harmony format and in both languages (guard_parts/tasks.py), then tasks alone until raw English
is 5 % worse, as post-training leaves it.  It goes on with Japanese of packages that it has not
seen; replay is English of other packages than it has read, and whole packages are held out:

    Japanese only
    replay 10/25/50 %    fixed shares of raw English
    text guard           bits per byte alone, ladder, from 10 % raw English
    new guard            text, replies and own traces, two-way, from 10 % raw English and 5 % traces
    yoked                the new guard's mean shares with the same base and order, fixed
    English only         a change that should do no harm

Every run is the product: `deepspeed cpt/run.py`, ZeRO, the mixture, the guard.  In the end each
model answers held-out items, 1,000 of each task where there are so many.  docs/guard.md names the
primary measure, which was written down before the runs.  What is done is not repeated, so the
script can be stopped and started again; machines may share the bases, and `--add` puts their
reports together.  `--smoke` shows that all parts work, at a size whose figures mean nothing.

The script needs a Debian system with a package mirror (for the texts) and about 2 GB of disk.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "bench"), str(ROOT / "bench" / "prove")]

from guard_parts.scale import REAL, SMOKE, Scale  # noqa: E402

IS_SMOKE = "--smoke" in sys.argv
# the vocabulary must be chosen before anything reads it, here and in every process of a run
os.environ["GUARD_PROOF_MERGES"] = str((SMOKE if IS_SMOKE else REAL).num_merges)

from guard_parts.small_vocabulary import shrink  # noqa: E402

shrink()

import torch  # noqa: E402
from guard_parts import behavior_outcome  # noqa: E402
from guard_parts.arms import ARMS, finished_run, make_own_traces, run_arm  # noqa: E402
from guard_parts.base import ANSWERS, build_base, make_base  # noqa: E402
from guard_parts.packages import write_texts  # noqa: E402
from guard_parts.task_files import write_tasks  # noqa: E402


def main() -> None:
    """Run what is not done yet, then print the table."""
    parser = argparse.ArgumentParser(description="The guard's proof on behavior.")
    parser.add_argument("--work_dir", type=Path)
    parser.add_argument("--smoke", action="store_true", help="small, to see that all parts work")
    parser.add_argument(
        "--parallel", type=int, default=2, help="runs at a time, of one thread each"
    )
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--bases", type=int, nargs="+", help="numbers of bases; default: all")
    parser.add_argument("--orders", type=int, nargs="+", help="orders of the data; default: all")
    parser.add_argument("--only_base", action="store_true", help="stop after the gates")
    parser.add_argument("--report", action="store_true", help="report what is done, run nothing")
    parser.add_argument(
        "--add",
        type=Path,
        nargs="+",
        default=[],
        help="JSON of reports whose runs count, too",
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--svg", type=Path)
    options = parser.parse_args()
    scale = SMOKE if options.smoke else REAL
    name = "prove_behavior_smoke" if options.smoke else "prove_behavior"
    work_dir: Path = (options.work_dir or ROOT / "runs" / name).resolve()
    numbers: list[int] = options.bases or list(range(1, scale.num_bases + 1))
    orders: list[int] = options.orders or list(range(1, scale.num_orders + 1))
    if not options.report:
        run_all(work_dir, scale, numbers, orders, options)
    if not options.only_base:
        write_report(work_dir, scale, options, numbers, orders)


def run_all(
    work_dir: Path, scale: Scale, numbers: list[int], orders: list[int], options: argparse.Namespace
) -> None:
    """Make the bases, and run every arm with each base and order."""
    write_texts(work_dir / "text", scale.text_bytes)
    write_tasks(work_dir / "tasks", scale)
    build_base(work_dir, scale)
    with ThreadPoolExecutor(options.parallel) as pool:
        bases = list(pool.map(partial(make_base, work_dir, scale), numbers))
        if options.only_base:
            return
        jobs = []
        for number, base in zip(numbers, bases, strict=True):
            make_own_traces(work_dir, scale, base, number)
            for order in orders:
                jobs.append(
                    pool.submit(_run_order, work_dir, scale, base, number, order, options.arms)
                )
        for job in jobs:
            job.result()


def _run_order(
    work_dir: Path, scale: Scale, base: Path, number: int, order: int, arms: list[str]
) -> None:
    """Run the arms of one base and order one after the other: the yoked one needs the steered."""
    for arm in arms:
        run_arm(work_dir, scale, base, number, order, arm)


def finished_runs(
    work_dir: Path, numbers: list[int], orders: list[int], arms: list[str]
) -> list[dict[str, Any]]:
    """Return the outcomes of the runs that are done."""
    runs = []
    for number, order, arm in itertools.product(numbers, orders, arms):
        run_dir = finished_run(work_dir, number, order, arm)
        if run_dir is not None:
            result = behavior_outcome.outcome(run_dir, work_dir / f"base-{number}" / ANSWERS)
            runs.append({"arm": arm, "base": number, "order": order, **result})
    return runs


def write_report(
    work_dir: Path,
    scale: Scale,
    options: argparse.Namespace,
    numbers: list[int],
    orders: list[int],
) -> None:
    """Print the table of the runs that are done, and write the JSON and the plot."""
    runs = finished_runs(work_dir, numbers, orders, options.arms)
    for path in options.add:
        runs = behavior_outcome.together(runs, json.loads(path.read_text())["runs"])
    planned = scale.num_bases * scale.num_orders * len(ARMS)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    date = time.strftime("%Y-%m-%d")
    tokens = scale.steps * scale.seq_len * scale.global_batch_size
    print(f"{len(runs)} of {planned} runs")
    print(behavior_outcome.table(runs))
    for kind in ("text_green", "guard_green"):
        green, lost = behavior_outcome.false_greens(runs, kind)
        print(f"{kind}: {green} of {len(runs)} runs are green with a lost accuracy ({lost} lost)")
    print(behavior_outcome.against_yoked(runs))
    if options.json:
        report = {
            "machine": machine,
            "date": date,
            "smoke": options.smoke,
            "runs_planned": planned,
            "runs": runs,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    if options.svg:
        source = f"{machine}, {date}; one point a run, {tokens:,} tokens"
        options.svg.write_text(behavior_outcome.draw(runs, source), encoding="utf-8")


if __name__ == "__main__":
    main()

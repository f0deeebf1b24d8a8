"""Measure this project on a machine with one GPU, in ten minutes, most informative parts first.

    python bench/gpu/acceptance.py --out DIR [--minutes 9] [--only NAME ...] [--tiny]

The stages run in a few processes, one after the other, because an error inside a GPU kernel leaves
its process without a GPU.  The result of each stage is appended to DIR/results.jsonl as soon as it
is there, so that being cut off loses only what has not run.  A stage that fails, or finds anything
wrong, is reported, and the others go on; a stage that no time is left for is skipped and named.  A
group that hangs is killed after a time of its own.  The exit code is 1 if anything was not right.

`--tiny` runs the same stages at toy sizes on a CPU, to test this program.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from cpt.model.kernels.availability import SWITCH  # noqa: E402
from gpu.stages import Options, record, run_stages, run_within  # noqa: E402


@dataclass(frozen=True, slots=True)
class Group:
    """Stages that share a process."""

    name: str
    """What results.jsonl calls it."""
    module: str
    """They are the STAGES of `gpu.stages_MODULE`."""
    most_seconds: float
    """Time after which the group is killed, several times what it took on an H100: a kernel that
    never ends must not take the time of the others.
    """
    only: tuple[str, ...] = ()
    """Names of the stages that run; all if empty."""
    environment: dict[str, str] = field(default_factory=dict)
    """Added to the environment of the process."""


GROUPS = (
    Group("kernels", "kernels", 150),
    Group("engine", "engine", 120, ("training_steps", "profile_of_a_step", "host_waits")),
    Group("truth", "truth", 90),
    Group("variants", "variants", 120),
    Group("products", "products", 120),
    Group("without fused kernels", "engine", 90, ("training_steps",), {SWITCH: "0"}),
    Group("state", "engine", 120, ("scores_are_repeatable", "resume_is_exact")),
    Group("commands", "commands", 480),
)
"""The groups, most informative first."""

RESULTS = "results.jsonl"
"""File of the results in the folder that was given."""

NOT_RIGHT = 3
"""Exit code of a group of which a stage has written that something is not right; Python's own for
an error is 1.
"""

SECONDS_TO_START = 20
"""Time under which no further process is started."""


def main() -> int:
    """Run all groups, or inside a child process the stages of one, and return the exit code."""
    options = parse()
    # as at an interruption from the keyboard, what was started is ended
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if options.group is not None:
        group = next(group for group in GROUPS if group.name == options.group)
        return 0 if run_stages(options, group.module, group.only) else NOT_RIGHT
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / RESULTS).unlink(missing_ok=True)
    for group in GROUPS:
        if not wanted(group, options):
            continue
        if options.seconds_left < SECONDS_TO_START:
            left = f"{options.seconds_left:.0f} s left"
            record(options, None, "skipped", 0.0, left, group.name)
            continue
        run_group(group, options)
    return int(not summarize(options))


def wanted(group: Group, options: Options) -> bool:
    """Return whether `--only` leaves any stage of a group, by the names of its stages."""
    if not options.only or not group.only:
        return True
    return any(word in name for word in options.only for name in group.only)


def run_group(group: Group, options: Options) -> None:
    """Run one group in a child process."""
    command = [sys.executable, __file__, "--group", group.name, "--out", str(options.out)]
    command += ["--deadline", str(options.deadline)]
    if options.tiny:
        command.append("--tiny")
    if options.only:
        command += ["--only", *options.only]
    print(f"=== {group.name}", flush=True)
    started = time.perf_counter()
    limit = min(group.most_seconds, options.seconds_left)
    code = run_within(command, limit, env={**os.environ, **group.environment})
    seconds = time.perf_counter() - started
    if code is None:
        record(options, None, "stopped", seconds, f"not done after {limit:.0f} s", group.name)
    elif code not in (0, NOT_RIGHT):
        record(options, None, "FAILED", seconds, f"ended with {code}", group.name)


def summarize(options: Options) -> bool:
    """Print what was not right or did not run, and return whether all that ran was right."""
    all_right = True
    file = options.out / RESULTS
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    for line in lines:
        found = json.loads(line)
        if found["state"] != "ok":
            print(f"=== {found['group']}, {found['stage'] or 'all'}: {found['state']}", flush=True)
            all_right = all_right and found["state"] == "skipped"
    return all_right


def parse() -> Options:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=9.0, help="time for everything")
    parser.add_argument("--only", nargs="+", help="stages whose name contains one of these words")
    parser.add_argument("--tiny", action="store_true", help="toy sizes, on a CPU")
    parser.add_argument("--group", help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.tiny:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return Options(
        out=options.out.resolve(),
        deadline=options.deadline or time.time() + 60 * options.minutes,
        tiny=options.tiny,
        only=options.only,
        group=options.group,
    )


if __name__ == "__main__":
    sys.exit(main())

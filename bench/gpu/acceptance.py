"""Measure this project on a machine with one GPU, in ten minutes, most informative parts first.

    python bench/gpu/acceptance.py --out DIR [--minutes 9] [--only NAME ...] [--tiny]

The stages run in a few processes, one after the other, because an error inside a GPU kernel leaves
its process without a GPU.  The result of each stage is appended to DIR/results.jsonl as soon as it
is there, so that being cut off loses only what has not run.  A stage that fails is reported, and
the others go on; a stage that no time is left for is skipped and named.

`--tiny` runs the same stages at toy sizes on a CPU, to test this program.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from cpt.model.kernels.availability import SWITCH  # noqa: E402
from gpu.stages import Options, run_stages  # noqa: E402


@dataclass(frozen=True, slots=True)
class Group:
    """Stages that share a process."""

    name: str
    """What results.jsonl calls it."""
    module: str
    """They are the STAGES of `gpu.stages_MODULE`."""
    only: tuple[str, ...] = ()
    """Names of the stages that run; all if empty."""
    environment: dict[str, str] = field(default_factory=dict)
    """Added to the environment of the process."""


GROUPS = (
    Group("kernels", "kernels"),
    Group("engine", "engine", ("training_steps", "profile_of_a_step", "host_waits")),
    Group("truth", "truth"),
    Group("products", "products"),
    Group("without fused kernels", "engine", ("training_steps",), {SWITCH: "0"}),
    Group("state", "engine", ("scores_are_repeatable", "resume_is_exact")),
    Group("commands", "commands"),
)
"""The groups, most informative first."""

SECONDS_TO_START = 20
"""Time under which no further process is started."""


def main() -> int:
    """Run all groups, or inside a child process the stages of one, and return the exit code."""
    options = parse()
    if options.group is not None:
        group = next(group for group in GROUPS if group.name == options.group)
        run_stages(options, group.module, group.only)
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "results.jsonl").unlink(missing_ok=True)
    failed = 0
    for group in GROUPS:
        if not wanted(group, options):
            continue
        left = options.deadline - time.time()
        if left < SECONDS_TO_START:
            print(f"=== {group.name}: skipped, {left:.0f} s left", flush=True)
            continue
        failed += run_group(group, options, left) != 0
    return int(failed > 0)


def wanted(group: Group, options: Options) -> bool:
    """Return whether `--only` leaves any stage of a group, by the names of its stages."""
    if not options.only or not group.only:
        return True
    return any(word in name for word in options.only for name in group.only)


def run_group(group: Group, options: Options, seconds: float) -> int:
    """Run one group in a child process, and return its exit code."""
    command = [sys.executable, __file__, "--group", group.name, "--out", str(options.out)]
    command += ["--deadline", str(options.deadline)]
    if options.tiny:
        command.append("--tiny")
    if options.only:
        command += ["--only", *options.only]
    print(f"=== {group.name}", flush=True)
    environment = {**os.environ, **group.environment}
    try:
        code = subprocess.run(
            command, cwd=ROOT, timeout=seconds, env=environment, check=False
        ).returncode
    except subprocess.TimeoutExpired:
        print(f"=== {group.name}: stopped, the time is up", flush=True)
        return 124
    if code:
        print(f"=== {group.name}: ended with {code}", flush=True)
    return code


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

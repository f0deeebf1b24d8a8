"""Prove that state on NVMe needs no memory: the limit that ends a run in memory lets it go on.

    python bench/prove/nvme.py [--layers 6] [--limit_mib 2600] [--folder runs/nvme]

One process trains the same small gpt-oss twice, with optimizer and weights offloaded to host memory
(`cpu`) and then to files (`nvme`).  For each it prints the state's size, the largest anonymous
memory, and the median time of a step.  Anonymous memory is memory that belongs to no file; it is
sampled every 5 ms from before the engine is built.

Then both run again in a memory cgroup with the limit, which counts the pages of files, too.  This
part is left out if the process has no right to make a cgroup.  The script ends with 1 if the run on
files was killed, or if the one in memory was not.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
import measuring  # noqa: E402
from step_parts.cases import OURS, Case, row  # noqa: E402

TOKENS = 512
EXPERTS = 32
STEPS = 6
PLACES = ("cpu", "nvme")
CGROUPS = {"memory": "memory.limit_in_bytes", "": "memory.max"}
"""Folders below /sys/fs/cgroup for versions 1 and 2, each with a cgroup's file for the limit."""


class AnonymousPeak(threading.Thread):
    """The largest anonymous memory of this process while the thread runs."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.num_bytes = 0

    def run(self) -> None:
        while True:
            self.num_bytes = max(self.num_bytes, measuring.resident_bytes("RssAnon"))
            time.sleep(0.005)


def train(options: argparse.Namespace) -> None:
    """Run once, in this process, and print what it took."""
    peak = AnonymousPeak()
    peak.start()
    before = measuring.resident_bytes("RssAnon")
    from step_parts.ours import build

    from cpt.config.offload_blocks import OFFLOADS
    from cpt.deepspeed_adapter.shards import state_tensors
    from cpt.job.memory_report import bytes_on
    from cpt.training.loader import make_micro_batch

    block: dict[str, Any] = {"device": options.place}
    if options.place == "nvme":
        block["nvme_path"] = str(options.folder)
    case = Case(
        contender=OURS,
        tokens=TOKENS,
        ranks=1,
        steps=STEPS,
        threads=1,
        experts=EXPERTS,
        layers=options.layers,
        clock="wall",
    )
    engine, topology = build(case, dict.fromkeys(OFFLOADS, block))
    seconds = []
    for step in range(1, STEPS + 1):
        began = time.perf_counter()
        batch = make_micro_batch([row(case, step)], [0], topology)
        result = engine.step([batch], [TOKENS], step=step)
        seconds.append(time.perf_counter() - began)
    state = state_tensors(engine.deepspeed)
    size = bytes_on("cpu", [tensor for tensors in state.values() for tensor in tensors])
    found = {
        "state": size,
        "anonymous": peak.num_bytes - before,
        "seconds": statistics.median(seconds[1:]),
    }
    print(json.dumps({**found, "loss": result.loss}))


def run(
    options: argparse.Namespace, place: str, cgroup: Path | None = None
) -> tuple[int, dict[str, Any]]:
    """Run in a process of its own, and return its exit code and what it printed."""
    command = [sys.executable, __file__, "--place", place]
    command += ["--layers", str(options.layers), "--folder", options.folder]
    done = run_within(cgroup, command)
    if done.returncode > 0:
        print(done.stderr[-2000:], file=sys.stderr)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return done.returncode, json.loads(lines[-1]) if lines else {}


def run_within(
    cgroup: Path | None, command: list[str], **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run a process of one thread that hands freed memory back at once.

    Args:
        cgroup: Folder of the cgroup that it is in; None for that of this process.
        command: The program with its arguments.
        variables: Further variables of its environment.
    """
    environment = {
        **os.environ,
        **measuring.RETURN_MEMORY,
        **measuring.single_process(),
        "OMP_NUM_THREADS": "1",
        **variables,
    }

    def join() -> None:
        if cgroup is not None:
            (cgroup / "cgroup.procs").write_text(str(os.getpid()))

    return subprocess.run(
        command, env=environment, capture_output=True, text=True, preexec_fn=join, check=False
    )


def limited(limit_bytes: int) -> Path | None:
    """Make a memory cgroup and return its folder, or None if this process may not make one."""
    for parent, file in CGROUPS.items():
        folder = Path("/sys/fs/cgroup") / parent / f"cpt-{os.getpid()}"
        try:
            folder.mkdir(exist_ok=True)
            (folder / file).write_text(str(limit_bytes))
            if (folder / "memory.swap.max").exists():
                (folder / "memory.swap.max").write_text("0")
            return folder
        except OSError:
            if folder.is_dir():
                folder.rmdir()
    return None


def remove(cgroup: Path) -> None:
    """Remove a cgroup; a process that was killed may take a moment to leave it."""
    for _ in range(50):
        try:
            cgroup.rmdir()
        except OSError:
            time.sleep(0.1)
        else:
            return


def main() -> None:
    """Make all runs and print a table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--limit_mib", type=int, default=2600)
    parser.add_argument("--folder", default="runs/nvme")
    parser.add_argument("--place", choices=PLACES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.place:
        train(options)
        return
    print("state in  size MiB  anonymous MiB  s per step")
    losses = set()
    for place in PLACES:
        code, found = run(options, place)
        if code != 0:
            sys.exit(f"{place}: exit code {code}")
        losses.add(found["loss"])
        state = found["state"] / 2**20
        anonymous = found["anonymous"] / 2**20
        line = f"{place:<8}  {state:8.0f}  {anonymous:13.0f}  {found['seconds']:10.2f}"
        print(line, flush=True)
    if len(losses) != 1:
        sys.exit(f"the losses differ: {losses}")
    cgroup = limited(options.limit_mib * 2**20)
    if cgroup is None:
        print("no memory cgroup can be made here: the limit was not tried")
        return
    try:
        outcomes = {place: run(options, place, cgroup) for place in PLACES}
    finally:
        remove(cgroup)
    for place, (code, found) in outcomes.items():
        line = "killed" if code == -signal.SIGKILL else f"exit code {code}"
        if found:
            same = found["loss"] in losses
            line += f", {found['seconds']:.2f} s per step, loss as before: {same}"
        print(f"{place} within {options.limit_mib} MiB: {line}")
    sys.exit(outcomes["nvme"][0] != 0 or outcomes["cpu"][0] != -signal.SIGKILL)


if __name__ == "__main__":
    main()

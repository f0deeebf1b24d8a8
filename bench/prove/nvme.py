"""State on NVMe needs no memory of its own: a run goes on within a limit that ends the same run
with state in memory.

    python bench/prove/nvme.py [--layers 6] [--limit_mib 2600] [--folder runs/nvme]

One process trains the same small gpt-oss twice, optimizer and weights offloaded to host memory
(`cpu`), then to files (`nvme`).  Printed for each: the state's size, the largest anonymous memory
(memory that is no file's, sampled every 5 ms from before the engine is built), the median time of a
step.  Then both run again in a memory cgroup with the limit, which counts the pages of files, too;
that part needs the right to make one, and is left out without.  Ends with 1 if the run on files was
killed, or the one in memory was not.
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

TOKENS, EXPERTS, STEPS = 512, 32, 6
PLACES = ("cpu", "nvme")
CGROUPS = {"memory/cpt-nvme": "memory.limit_in_bytes", "cpt-nvme": "memory.max"}
"""Of version 1 and 2, below /sys/fs/cgroup, with the file for the limit."""


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
    """One run, in this process; prints what it took."""
    peak = AnonymousPeak()
    peak.start()
    before = measuring.resident_bytes("RssAnon")
    from step_parts.ours import build

    from cpt.config.engine_json import OFFLOADS
    from cpt.deepspeed_adapter.shards import state_tensors
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
    engine, topology = build(case, {name: block for name in OFFLOADS})
    seconds = []
    for step in range(1, STEPS + 1):
        began = time.perf_counter()
        result = engine.step(
            [make_micro_batch([row(case, step)], [0], topology)], [TOKENS], step=step
        )
        seconds.append(time.perf_counter() - began)
    state = state_tensors(engine.deepspeed)
    size = sum(tensor.nbytes for tensors in state.values() for tensor in tensors)
    found = {
        "state": size,
        "anonymous": peak.num_bytes - before,
        "seconds": statistics.median(seconds[1:]),
    }
    print(json.dumps({**found, "loss": result.loss}))


def run(
    options: argparse.Namespace, place: str, cgroup: Path | None = None
) -> tuple[int, dict[str, Any]]:
    """Exit code and what a run printed, in a process of its own."""
    environment = {
        **os.environ,
        **measuring.RETURN_MEMORY,
        "OMP_NUM_THREADS": "1",
        "MASTER_ADDR": "127.0.0.1",
    }
    environment |= {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_PORT": measuring.free_port(),
    }
    command = [
        sys.executable,
        __file__,
        "--place",
        place,
        "--layers",
        str(options.layers),
        "--folder",
        options.folder,
    ]

    def join() -> None:
        if cgroup is not None:
            (cgroup / "cgroup.procs").write_text(str(os.getpid()))

    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, preexec_fn=join, check=False
    )
    if done.returncode > 0:
        print(done.stderr[-2000:], file=sys.stderr)
    lines = [line for line in done.stdout.splitlines() if line.startswith("{")]
    return done.returncode, json.loads(lines[-1]) if lines else {}


def limited(limit_bytes: int) -> Path | None:
    """A new memory cgroup; None where this process may not make one."""
    for name, file in CGROUPS.items():
        folder = Path("/sys/fs/cgroup") / name
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


def main() -> None:
    """Run all and print a table."""
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
        sizes = [found[key] / 2**20 for key in ("state", "anonymous")]
        print(
            f"{place:<8}  {sizes[0]:8.0f}  {sizes[1]:13.0f}  {found['seconds']:10.2f}", flush=True
        )
    if len(losses) != 1:
        sys.exit(f"the losses differ: {losses}")
    cgroup = limited(options.limit_mib * 2**20)
    if cgroup is None:
        print("no memory cgroup can be made here: the limit was not tried")
        return
    try:
        outcomes = {place: run(options, place, cgroup) for place in PLACES}
    finally:
        cgroup.rmdir()
    for place, (code, found) in outcomes.items():
        seconds = (
            f", {found['seconds']:.2f} s per step, loss as before: {found['loss'] in losses}"
            if found
            else ""
        )
        told = "killed" if code == -signal.SIGKILL else f"exit code {code}"
        print(f"{place} within {options.limit_mib} MiB: {told}{seconds}")
    sys.exit(outcomes["nvme"][0] != 0 or outcomes["cpu"][0] != -signal.SIGKILL)


if __name__ == "__main__":
    main()

"""Nothing beside training ends training: a run in which every write and helper beside it fails ends
with the weights of one that nothing happened to.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cpt.checkpoint.reader import list_steps, step_folder
from cpt.resilience.processes import command_of
from cpt.telemetry.metrics import read_events
from tests.faults.test_crash import shards
from tests.faults.test_storage import small_disk
from tests.support.service import STEPS, Service, service

pytestmark = pytest.mark.dist

SETTINGS = {
    "telemetry.wandb": "offline",
    "telemetry.tensorboard": "true",
    "telemetry.router_interval_steps": "1",
    "telemetry.sample_interval_steps": "4",
    "telemetry.sample_tokens": "2",
    "guard.enabled": "true",
    "guard.interval_steps": "4",
    "guard.policy": "warn",
    "checkpoint.keep_last": "2",
}
FAULT = "forward:1:3:stop,forward:1:6:stop"
"""Rank 1 stands still in steps 3 and 6, while the test does something to its surroundings."""
WARNINGS = (
    "The configuration of this start is not kept",
    "The next start will begin another W&B run",
    "Later starts will not measure the drift of the routers",
    "TensorBoard failed and is left out from now on",
    "metrics.jsonl cannot be written",
    "The scores of the guard at step 4 are not kept",
    "the checkpoint of step 4 was not saved, the run goes on",
    "report.html is not drawn",
)
"""What the log tells, each once."""


def obstruct(run_dir: Path) -> None:
    """Put folders where the run wants files, and files where it wants folders."""
    run_dir.mkdir()
    for name in ("wandb_run.json", "router_original.safetensors", "report.html"):
        (run_dir / name / "in the way").mkdir(parents=True)
    for name in ("configs", "tensorboard"):
        (run_dir / name).write_text("in the way", encoding="utf-8")


def fill(disk: Path) -> Path:
    """Use up all room of a disk and return the file that does."""
    file = disk / "filler"
    with contextlib.suppress(OSError), file.open("wb", buffering=0) as opened:
        while opened.write(b"\0" * 4096):
            pass
    return file


def wait_until(condition: Callable[[], bool], run: Service, what: str) -> None:
    """Wait for a condition on a run that is alive."""
    deadline = time.monotonic() + 240
    while not condition():
        assert run.process.poll() is None and time.monotonic() < deadline, f"{what}:\n{run.output}"
        time.sleep(0.05)


def is_stopped(pid: int) -> bool:
    """Return whether a process stands still.

    Raises:
        OSError: it is gone.
    """
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T"


def kill_wandb(run: Service) -> None:
    """Kill the process of the W&B library, as the kernel does when memory runs out."""
    wait_until(lambda: any((run.run_dir / "wandb").glob("offline-run-*")), run, "W&B records")
    killed = []
    for pid in run.pids():
        if "wandb-core" in " ".join(command_of(pid)[:1]):
            os.kill(pid, signal.SIGKILL)
            killed.append(pid)
    assert killed, run.output


@pytest.mark.case("D5", "one warning each; exit 0, all lines of metrics.jsonl, same final weights")
def test_everything_beside_training_fails(workplace: Path, undisturbed: Service) -> None:
    shard_bytes = sum(file.stat().st_size for file in step_folder(undisturbed.run_dir, 6).iterdir())
    arguments = []
    for key, value in SETTINGS.items():
        arguments += ["--set", f"{key}={value}"]
    disk = workplace / "filled"
    with small_disk(disk, 5 * shard_bytes + 2**26):
        obstruct(disk / "run")
        with service(workplace, "filled/run", *arguments, fault=FAULT) as run:
            wait_until(lambda: 1 in run.rank_pids(), run, "rank 1 is there")
            rank_1 = run.rank_pids()[1]
            wait_until(lambda: is_stopped(rank_1), run, "rank 1 stands still in step 3")
            kill_wandb(run)
            filler = fill(disk)
            os.kill(rank_1, signal.SIGCONT)
            wait_until(lambda: not is_stopped(rank_1), run, "rank 1 goes on")
            wait_until(lambda: is_stopped(rank_1), run, "rank 1 stands still in step 6")
            events = read_events(run.run_dir / "metrics.jsonl")
            # the last page of the file had room for a line or two
            assert max(event["step"] for event in events if event["event"] == "step") < 5
            filler.unlink()
            os.kill(rank_1, signal.SIGCONT)
            assert run.wait() == 0, run.output
            run.check_nothing_left()
        told = {warning: run.output.count(warning) for warning in WARNINGS}
        assert set(told.values()) == {1}, f"{told}\n{run.output}"
        assert "W&B failed" in run.output, run.output
        assert "Traceback" not in run.output, run.output
        assert run.step_numbers() == list(range(1, STEPS + 1))
        assert (run.run_dir / "metrics.jsonl").read_bytes().endswith(b"\n")
        assert list_steps(run.run_dir) == [6, 2]
        assert shards(run.run_dir) == shards(undisturbed.run_dir)

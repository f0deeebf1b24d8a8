"""A rank that dies, hangs or lags is named, and nothing is left running."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
import torch.distributed as dist

from cpt.checkpoint.manifest import PARTS
from cpt.checkpoint.reader import list_steps, step_folder
from cpt.resilience.processes import kernel_report_of
from cpt.telemetry.goodput import goodput
from cpt.telemetry.metrics import read_events
from cpt.telemetry.run_end import read_failure
from tests.dist.test_layout_parity import stored_tensors
from tests.support.service import STEPS, Service, run_to_end, service
from tests.support.tensors import differing

pytestmark = pytest.mark.dist

TEN_STEPS = ("--set", "train.total_steps=10")
QUICK_WATCH = ("--set", "watchdog.timeout_seconds=20", "--set", "watchdog.interval_seconds=0.5")


def shared_buffers() -> set[str]:
    """Return the files that DeepSpeed's all-reduce over shared memory would leave behind."""
    return {path.name for path in Path("/dev/shm").glob("deepspeed_allreduce*")}


def assert_same_weights(first: Service, second: Service) -> None:
    for part in PARTS:
        expected = stored_tensors(step_folder(first.run_dir, STEPS), part)
        got = stored_tensors(step_folder(second.run_dir, STEPS), part)
        assert differing(expected, got) == []


@pytest.mark.case(
    "C1",
    "named first with signal, process and node, no traceback on the terminal; others exit, no "
    "orphan, newest checkpoint intact; the rerun ends with the same weights",
)
@pytest.mark.case(
    "M1", "on a real run: printed, below 1, restart and saves counted, within the time on the clock"
)
@pytest.mark.case("G5", "a killed run leaves no buffer in /dev/shm")
def test_killed_rank_takes_the_run_down_and_the_rerun_ends_with_the_same_weights(
    workplace, undisturbed
) -> None:
    began = time.monotonic()
    buffers = shared_buffers()
    code, run = run_to_end(workplace, "killed", fault="forward:1:4:kill")
    announced = "fault injected: forward rank=1 step=4 action=kill"
    assert code in (256 - signal.SIGKILL, 128 + signal.SIGKILL), run.output
    check_killed_rank_is_blamed(run, announced)
    assert run.step_numbers() == [1, 2, 3] and list_steps(run.run_dir) == [2]
    code, run = run_to_end(workplace, "killed")
    assert code == 0, run.output
    assert_same_weights(undisturbed, run)
    assert shared_buffers() <= buffers
    spent = goodput(read_events(run.run_dir / "metrics.jsonl"))
    assert spent.num_starts == 2 and 0 < spent.share < 1 and spent.describe() in run.output
    for kind in ("start_up", "save_wait", "restart"):
        assert spent.lost[kind] > 0
    assert spent.total <= time.monotonic() - began
    counted = {event["step"]: event["seconds"] for event in run.steps()}
    assert 0.8 * sum(counted.values()) <= spent.productive <= sum(counted.values())


def check_killed_rank_is_blamed(run: Service, announced: str) -> None:
    """Check that rank 1, killed in step 4, is the only one that anything speaks of."""
    after = run.output.partition(announced)[2].strip()
    assert after.startswith("watchdog: rank 1 (process "), after
    assert "was killed by signal 9 (SIGKILL) in step 4." in after.splitlines()[0]
    for word in ("Traceback", "Connection", "internal error", "rank 0 failed"):
        assert word not in after, after
    failure = read_failure(run.run_dir)
    assert failure is not None and failure.cause in after
    assert (failure.rank, failure.signal, failure.exit_code) == (1, signal.SIGKILL, 137)
    assert failure.host == failure.node == socket.gethostname()
    (event,) = run.events("end")
    assert (event["exit_code"], event["step"], event["cause"]) == (137, 3, failure.cause)


@pytest.mark.case("C1", "rank 0, which holds the store, is named like any other")
def test_killed_first_rank_is_named_by_the_others(workplace) -> None:
    began = time.monotonic()
    code, run = run_to_end(workplace, "killed-first", fault="forward:0:4:kill")
    assert time.monotonic() - began < 200  # nobody has waited for the store in vain
    assert code in (256 - signal.SIGKILL, 128 + signal.SIGKILL), run.output
    assert "watchdog: rank 0 (process " in run.output and "Traceback" not in run.output, run.output
    failure = read_failure(run.run_dir)
    assert failure is not None and (failure.rank, failure.signal) == (0, signal.SIGKILL)
    assert [event["exit_code"] for event in run.events("end")] == [137]


@pytest.mark.parametrize("rank", [1, pytest.param(0, id="0-which-holds-the-store")])
@pytest.mark.case(
    "H1", "rank named with phase and step, stacks of all ranks, exit 71 everywhere, no process left"
)
def test_stopped_rank_is_named_and_the_run_ends_with_71(workplace, rank: int) -> None:
    fault = f"backward:{rank}:4:sleep=600"
    with service(workplace, f"stopped-{rank}", *QUICK_WATCH, fault=fault) as run:
        run.wait_for("fault injected")
        time.sleep(4)  # the others learn where it is
        os.kill(run.rank_pids()[rank], signal.SIGSTOP)
        code = run.wait()
        run.check_nothing_left()
    assert code == 71, run.output
    named = f"rank {rank}, which holds the store, last" if rank == 0 else f"rank {rank} last"
    assert f"watchdog: {named} seen in phase=backward step=4" in run.output, run.output
    awake = f"watchdog: rank {rank} runs again; it stands in phase=backward step=4"
    assert awake in run.output, run.output
    stacks = {path.name: path.read_text() for path in (run.run_dir / "stacks").iterdir()}
    assert stacks.keys() == {"rank-0.txt", "rank-1.txt"}
    for text in stacks.values():
        assert "stacks of rank" in text and "engine.py" in text, stacks
    assert "State:\tT (stopped)" in stacks[f"rank-{rank}.txt"]
    assert list_steps(run.run_dir) == [2]


@pytest.mark.case("H1", "hung main thread (not the process): named as the one that is behind")
@pytest.mark.case(
    "X4",
    "absent from log, metrics, configuration, manifests, W&B and TensorBoard files, stack dumps",
)
def test_rank_that_sleeps_is_named_by_its_place(workplace) -> None:
    trackers = ("--set", "telemetry.wandb=offline", "--set", "telemetry.tensorboard=true")
    code, run = run_to_end(workplace, "asleep", *QUICK_WATCH, *trackers, fault="data:1:4:sleep=600")
    assert code == 71 and "rank 1 last seen in phase=data step=4, not moving" in run.output, (
        run.output
    )
    assert "faults.py" in (run.run_dir / "stacks" / "rank-1.txt").read_text()
    assert list((run.run_dir / "wandb").glob("offline-run-*")) and list(
        (run.run_dir / "tensorboard").iterdir()
    )
    run.check_no_secret()
    failure = read_failure(run.run_dir)
    assert failure is not None and failure.exit_code == 71 and failure.rank == 1
    assert failure.cause in run.output


@pytest.mark.case("H2", "line and event with rank, phase and ratio; the run goes on")
@pytest.mark.case("X4", "absent from log and crash output")
@pytest.mark.case(
    "H3", "all ranks exit within 20 s with the code of the cause, which comes first in the log"
)
def test_slow_rank_is_reported_and_failing_rank_takes_all_along_with_the_cause_first(
    workplace,
) -> None:
    watch = ("--set", "watchdog.interval_seconds=0.2", "--set", "watchdog.straggler_ratio=1.5")
    with service(
        workplace, "slow", *watch, *TEN_STEPS, fault="data:1:7:sleep=10,data:1:9:raise"
    ) as run:
        run.wait_for("fault injected: data rank=1 step=9")
        failed_at = time.monotonic()
        code = run.wait()
        assert time.monotonic() - failed_at < 20
        run.check_nothing_left()
    output = run.output
    assert code == 70, output
    (straggler,) = [event for event in run.events("straggler") if event["step"] == 7]
    assert (straggler["rank"], straggler["phase"]) == (1, "data") and straggler["ratio"] > 1.5
    assert "watchdog: straggler: rank 1 took " in output
    assert run.step_numbers() == list(range(1, 9))
    after = output[output.index("step=9 action=raise") :]
    cause = "watchdog: rank 1 failed in phase=data step=9: InjectedFault: injected at data, step 9"
    assert cause in after and "Traceback" not in after[: after.index(cause)]
    assert "Connection" not in after[: after.index(cause)], (
        "a consequence on another rank comes before the cause"
    )
    assert "Traceback" not in output
    log = run.run_dir / "logs" / "rank-00001.log"
    assert "The stack trace is in" in output and log.name in output
    assert "Traceback" in log.read_text() and "InjectedFault" in log.read_text()
    failure = read_failure(run.run_dir)
    assert failure is not None and (failure.exit_code, failure.rank) == (70, 1)
    run.check_no_secret()


@pytest.fixture
def stopped_process() -> Iterator[int]:
    """A process of this user that is stopped, and none of the run."""
    process = subprocess.Popen(["sleep", "600"])
    process.send_signal(signal.SIGSTOP)
    yield process.pid
    process.kill()
    process.wait()


def write_verdicts(port: int, pid: int, is_over: threading.Event) -> None:
    """Write a ruling that would end the run with 0 and wake a process, wherever one could be."""
    verdict = {"kind": "hung", "rank": 0, "code": 0, "text": "\x1b]0;owned\x07"}
    verdict["wake"] = {"7": [socket.gethostname(), pid]}
    client = dist.TCPStore(
        "127.0.0.1",
        port,
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=20),
    )
    while not is_over.wait(0.05):
        keys = {"cpt/watchdog/verdict"}
        for key in client.list_keys():
            if "/beat/" in key and "cpt/watchdog" in key:
                keys |= {f"{key.partition('/beat/')[0]}/verdict", key}
        for key in keys:
            client.set(key, json.dumps(verdict))


@pytest.mark.case(
    "H4",
    "told and counted, no process is woken, trained to the end; the secret of the job is in no "
    "file and no output",
)
def test_stranger_at_the_port_neither_ends_the_run_nor_wakes_a_process(
    workplace, stopped_process: int
) -> None:
    secret = "canary-of-cpt-job-secret-0123456789abcdef"
    own = {"CPT_JOB_SECRET": secret}
    watch = ("--set", "watchdog.interval_seconds=0.2")
    is_over = threading.Event()
    with service(workplace, "attacked", *watch, fault="data:1:4:sleep=4", environment=own) as run:
        run.wait_for("fault injected")
        port = int(run.pids()[run.rank_pids()[0]]["MASTER_PORT"])
        attack = threading.Thread(target=write_verdicts, args=(port, stopped_process, is_over))
        attack.start()
        time.sleep(4)
        is_over.set()
        attack.join()
        code = run.wait()
        run.check_nothing_left()
    assert code == 0, run.output
    assert "State:\tT (stopped)" in "\n".join(kernel_report_of(stopped_process))
    assert run.step_numbers() == list(range(1, STEPS + 1))
    assert run.events("foreign_record")[0]["count"] == 1
    assert run.output.count("somebody writes into the store of this run") <= 3
    assert "\x1b]0" not in run.output and not (run.run_dir / "stacks").exists()
    for path in [run.log, *run.run_dir.rglob("*")]:
        assert not path.is_file() or secret.encode() not in path.read_bytes(), path

"""Go on in the layout of another stage: each process replaces its program by a new start of it.

    last step of a stage -> all ranks save -> leave everything that a start holds -> execve
                                                            |
                              the same command: an ordinary start that finds the checkpoint

Decisions
    A start in another layout is one that resumes in another layout, which any checkpoint allows. So
    nothing is rebuilt inside a process, and nothing of the old layout stays in the memory of a GPU.
    The process stays: launchers and batch systems see neither an end nor a beginning.
    Nothing is inherited but standard input, output and error, the environment, and signals that
    came meanwhile: they are blocked before and let through once the new program listens for them.
    The first rank's store is gone before another rank looks for the next one at the same port.
    The secret of the job goes back into the environment, from which the next start takes it.
    A process that cannot do this leaves with exit code 75, as after a stop.
"""

from __future__ import annotations

import fcntl
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Mapping
from typing import NoReturn

import torch.distributed as dist

from cpt.deepspeed_adapter.groups import create_control_group
from cpt.errors import StageFinished
from cpt.job.job import Job
from cpt.job.passed_gate import PassedGate
from cpt.job.saving import end
from cpt.parallel.agreement import on_first_rank
from cpt.resilience.environment import JOB_SECRET, STAGE_STARTS, stage_starts
from cpt.resilience.stop import SIGNALS, StopRequest

log = logging.getLogger("cpt.job.stage_switch")

STORE_SECONDS = 60.0
"""Longest wait for the end of the first rank's store."""
_POLL_SECONDS = 0.05


def agree_on_stage(passed: PassedGate) -> PassedGate:
    """Return the start in the stage that the first rank has found in the newest checkpoint.

    All ranks call this, before there is a topology: the stage decides the layout.
    """
    if len(passed.configs) == 1:
        return passed
    group = create_control_group()
    return passed.in_stage(on_first_rank(group, lambda: passed.config.stage))


def change_stage(job: Job) -> NoReturn:
    """Leave, because the next step is one of another stage and a checkpoint of this one is there.

    Raises:
        StageFinished: on all ranks.
    """
    stages = job.config.stages
    following = stages[job.next_stage]
    finished = StageFinished(
        f"after step {job.progress.step} the run goes on in stage {job.next_stage + 1} of "
        f"{len(stages)}: rows of {following.seq_len} tokens, sequence_parallel_size "
        f"{following.sequence_parallel_size}. Saved."
    )
    job.telemetry.log(
        {
            "event": "stage",
            "step": job.progress.step,
            "stage": job.next_stage + 1,
            "seq_len": following.seq_len,
            "global_batch_size": following.global_batch_size,
            "sequence_parallel_size": following.sequence_parallel_size,
        }
    )
    end(job, finished.exit_code, str(finished))
    if job.topology.rank == 0:
        log.info("%s", finished)
    raise finished


def start_again(stop: StopRequest, secret: bytes | None, finished: StageFinished) -> NoReturn:
    """Start this program anew in this process; all ranks call this together.

    Args:
        stop: Requests to stop; one that nobody has answered reaches the next start as a signal.
        secret: The secret of the job, for the environment of the next start.
        finished: Why; raised if the process cannot be replaced.
    """
    is_first = dist.get_rank() == 0
    is_own_store = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    dist.barrier(create_control_group())
    dist.destroy_process_group()
    if is_own_store and not is_first:
        _wait_for_end_of_store()
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    environment = next_environment(os.environ, secret)
    sys.stdout.flush()
    sys.stderr.flush()
    _close_on_exec()
    if stop.requested():
        # to this thread, where it stays pending through execve; one for the process would go to a
        # thread that does not block it, and end with that thread
        signal.pthread_kill(threading.get_ident(), signal.SIGTERM)
    try:
        os.execve(sys.executable, _command(), environment)
    except OSError as error:
        log.error("%s: cannot be started again (%s)", sys.executable, error.strerror)
        raise finished from error


def next_environment(variables: Mapping[str, str], secret: bytes | None) -> dict[str, str]:
    """Return the environment of the next start.

    Args:
        variables: That of this one.
        secret: The secret of the job, which was taken out of it; None if it has none.
    """
    environment = dict(variables)
    environment[STAGE_STARTS] = str(stage_starts(variables) + 1)
    if secret is not None:
        environment[JOB_SECRET] = secret.decode()
    if "TORCHELASTIC_RESTART_COUNT" in environment:
        # torchrun's own store stays, and keeps the names of this start; torch puts the number of
        # the attempt before every name (torch/distributed/rendezvous.py), so a number that torchrun
        # does not reach gives the next start names of its own
        attempt = int(environment["TORCHELASTIC_RESTART_COUNT"])
        environment["TORCHELASTIC_RESTART_COUNT"] = str(attempt + 1_000_000)
    return environment


def _command() -> list[str]:
    """Return the command of this process, with the options of the interpreter."""
    options: list[str] = []
    if sys.argv[0] in sys.orig_argv:
        options = sys.orig_argv[1 : sys.orig_argv.index(sys.argv[0])]
    return [sys.executable, *options, *sys.argv]


def _close_on_exec() -> None:
    """Let the next program inherit no file and no connection but the standard ones.

    Python's own are not inherited; those of gloo and of other libraries in C would be, and a port
    that stays open cannot be opened again.
    """
    for name in os.listdir("/proc/self/fd"):
        descriptor = int(name)
        if descriptor > 2:
            try:
                flags = fcntl.fcntl(descriptor, fcntl.F_GETFD)
                fcntl.fcntl(descriptor, fcntl.F_SETFD, flags | fcntl.FD_CLOEXEC)
            except OSError:
                continue  # closed since it was listed


def _wait_for_end_of_store() -> None:
    """Wait until nothing listens at the port of the first rank, which is about to be replaced."""
    place = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
    deadline = time.monotonic() + STORE_SECONDS
    while time.monotonic() < deadline:
        try:
            socket.create_connection(place, timeout=1.0).close()
        except OSError:
            return
        time.sleep(_POLL_SECONDS)

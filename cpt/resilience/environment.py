"""Read what launchers and batch systems tell a process through its environment.

This is the only place where these variables are parsed.  Each one that cannot be right is told with
its value and what to do, all of them in one message.  A variable that is set and empty counts as
one that is not set.

This module imports nothing heavy, because the rank is needed while torch is not imported yet.
"""

from __future__ import annotations

import os
import re
import socket
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from cpt.errors import ConfigError

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
LOCAL_SIZE_NAMES = ("LOCAL_WORLD_SIZE", "LOCAL_SIZE")
"""Ranks on this node: torchrun sets the first, DeepSpeed the second."""
JOB_SECRET = "CPT_JOB_SECRET"
"""The variable with a secret that all ranks of a job share; see cpt.resilience.job_secret."""
STAGE_STARTS = "CPT_STAGE_STARTS"
"""The variable in which a process counts its starts for another stage (cpt.job.stage_switch)."""
MIN_SECRET_LENGTH = 32
"""Characters of a secret that nobody guesses."""
_LARGEST = 2**31 - 1
_MOST_DIGITS = 18
_LEFTOVER_SECONDS = 3600
"""How long after the end of a Slurm job its variables count as left over; the administrator may let
jobs overrun for a while.
"""
_NO_GPU_WORDS = ("nodevfiles", "none", "void")
"""Words that Slurm and containers write into CUDA_VISIBLE_DEVICES where there is no GPU."""
_GPU_ID = re.compile(r"[0-9]{1,9}|GPU-[0-9A-Fa-f-]{1,40}|MIG-[0-9A-Za-z/-]{1,80}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LaunchEnvironment:
    """The place of this process in a run, and the job that it belongs to."""

    rank: int
    world_size: int
    """Number of ranks."""
    local_rank: int
    local_world_size: int
    """Ranks on this node."""
    master_port: int
    restarts: int
    """How often Slurm has put the job back into its queue, and this process has started again for
    another stage."""
    gpu_ids: tuple[str, ...] | None
    """What CUDA_VISIBLE_DEVICES names; None if it is not set."""


def read_environment(
    variables: Mapping[str, str] = os.environ, now: float | None = None
) -> LaunchEnvironment:
    """Read the environment of a rank.

    Args:
        variables: The environment.
        now: Seconds since 1970; None takes the clock.

    Raises:
        ConfigError: every variable that is missing, malformed, or contradicts another one.
    """
    reader = _Reader(variables)
    world_size = reader.number("WORLD_SIZE", least=1)
    rank = reader.number("RANK")
    local_size = reader.local_world_size(world_size)
    local_rank = reader.number("LOCAL_RANK", default=0)
    port = reader.number("MASTER_PORT", least=1, most=65535)
    if not reader.text("MASTER_ADDR"):
        reader.missing("MASTER_ADDR")
    restarts = reader.number("SLURM_RESTART_COUNT", default=0) + stage_starts(variables)
    gpu_ids = reader.gpu_ids(local_size)
    reader.check_job_end(time.time() if now is None else now)
    reader.check_secret()
    reader.check_places(rank, world_size, local_rank, local_size)
    if reader.problems:
        raise ConfigError(reader.problems)
    return LaunchEnvironment(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_size,
        master_port=port,
        restarts=restarts,
        gpu_ids=gpu_ids,
    )


def is_launched(variables: Mapping[str, str] = os.environ) -> bool:
    """Return whether a launcher has given this process a place among ranks."""
    return any(variables.get(name, "").strip() for name in ("RANK", "WORLD_SIZE"))


def restore_gpu_ids(variables: MutableMapping[str, str] = os.environ) -> None:
    """Give CUDA the UUIDs of this node's GPUs, which DeepSpeed's launcher replaces by numbers.

    On a node that is shared, the numbers may be those of another job's GPUs.  `slurm/node.sh` keeps
    the ids in CPT_VISIBLE_DEVICES.  This must happen before CUDA is used.
    """
    ids = variables.get("CPT_VISIBLE_DEVICES", "").strip()
    if ids:
        variables["CUDA_VISIBLE_DEVICES"] = ids


def rank_of_environment(variables: Mapping[str, str] = os.environ) -> int:
    """Return the rank that a launcher gave this process; 0 without one that can be read."""
    return _number(variables.get("RANK", "")) or 0


def speaks_for_node(variables: Mapping[str, str] = os.environ) -> bool:
    """Return whether this process tells refusals: the first of its node, or one without a place."""
    text = variables.get("LOCAL_RANK", "")
    no_place = bool(text) and not _number(text)
    return rank_of_environment(variables) == 0 or no_place


def stage_starts(variables: Mapping[str, str] = os.environ) -> int:
    """Return how often this process has started its program again for another stage."""
    return _number(variables.get(STAGE_STARTS, "")) or 0


def restarts_of_job(variables: Mapping[str, str] = os.environ) -> int:
    """Return how often Slurm has queued the job again; 0 if it does not say so."""
    return _number(variables.get("SLURM_RESTART_COUNT", "")) or 0


def job_id(variables: Mapping[str, str] = os.environ) -> str:
    """Return the job that this process belongs to; empty outside of one.

    PBS and AGE jobs submit themselves again under a new number: the templates give the first one in
    CPT_JOB.
    """
    return variables.get("CPT_JOB", "").strip() or variables.get("SLURM_JOB_ID", "").strip()


def job_end(variables: Mapping[str, str] = os.environ) -> float | None:
    """Return when the Slurm job ends, in seconds since 1970; None if it does not say so."""
    end = _number(variables.get("SLURM_JOB_END_TIME", ""), most=10**_MOST_DIGITS)
    return None if end is None else float(end)


def node_name(variables: Mapping[str, str] = os.environ) -> str:
    """Return what the batch system calls this node, or its host name."""
    return variables.get("SLURMD_NODENAME", "").strip() or socket.gethostname()


def ranks_of_node(variables: Mapping[str, str] = os.environ) -> range:
    """Return the ranks that the launcher has started on this node, this one included."""
    rank = rank_of_environment(variables)
    local_rank = _number(variables.get("LOCAL_RANK", "")) or 0
    sizes = [_number(variables.get(name, "")) for name in LOCAL_SIZE_NAMES]
    size = next((found for found in sizes if found), 1)
    return range(rank - local_rank, rank - local_rank + size)


def _number(text: str, most: int = _LARGEST) -> int | None:
    """Return a whole number from 0 to `most`; None if the text is none."""
    text = text.strip()
    if not (text.isascii() and text.isdigit() and len(text) <= _MOST_DIGITS):
        return None
    number = int(text)
    return number if number <= most else None


class _Reader:
    """Reads variables and collects what is wrong with them."""

    def __init__(self, variables: Mapping[str, str]) -> None:
        self._variables = variables
        self.problems: list[str] = []

    def text(self, name: str) -> str:
        return self._variables.get(name, "").strip()

    def missing(self, name: str) -> None:
        self.problems.append(
            f"the environment has no {name}. Start with  deepspeed cpt/run.py  or torchrun."
        )

    def number(
        self, name: str, *, least: int = 0, most: int = _LARGEST, default: int | None = None
    ) -> int:
        """Return a number; `least`, with a problem noted, if there is none."""
        text = self.text(name)
        if not text:
            if default is None:
                self.missing(name)
                return least
            return default
        value = _number(text, most)
        if value is None or value < least:
            self._wrong(name, f"must be a whole number from {least} to {most}. {_advice_for(name)}")
            return least
        return value

    def local_world_size(self, world_size: int) -> int:
        """Return the ranks on this node: all, if no launcher tells."""
        for name in LOCAL_SIZE_NAMES:
            if self.text(name):
                size = self.number(name, least=1)
                if size > world_size and not self.problems:
                    self._wrong(
                        name,
                        f"but WORLD_SIZE is {world_size}, which counts the ranks of all nodes. "
                        f"{_advice_for(name)}",
                    )
                return size
        return world_size

    def check_places(self, rank: int, world_size: int, local_rank: int, local_size: int) -> None:
        """Compare the ranks with the sizes, unless one of them is wrong by itself."""
        if self.problems:
            return
        if rank >= world_size:
            self._wrong("RANK", f"but WORLD_SIZE is {world_size}. {_advice_for('RANK')}")
        if local_rank >= local_size:
            self._wrong(
                "LOCAL_RANK", f"but this node has {local_size} ranks. {_advice_for('LOCAL_RANK')}"
            )
        one_node = local_size == world_size and bool(self.text("LOCAL_RANK"))
        if not self.problems and one_node and local_rank != rank:
            self._wrong(
                "LOCAL_RANK",
                f"but RANK is {rank} and all {world_size} ranks are on this node. "
                f"{_advice_for('LOCAL_RANK')}",
            )

    def check_job_end(self, now: float) -> None:
        """Refuse the end of a Slurm job that is long over: a run would stop at once."""
        name = "SLURM_JOB_END_TIME"
        if not self.text(name):
            return
        end = job_end(self._variables)
        if end is None:
            self._wrong(name, "must be seconds since 1970. Unset it.")
        elif end < now - _LEFTOVER_SECONDS:
            hours = (now - end) / 3600
            self._wrong(
                name,
                f"which was {hours:.0f} hours ago: it is left over from a job that has ended. "
                "Unset the SLURM_* variables, or start in a new shell.",
            )

    def check_secret(self) -> None:
        """Refuse a secret that can be guessed, without showing it."""
        length = len(self.text(JOB_SECRET))
        if 0 < length < MIN_SECRET_LENGTH:
            self.problems.append(
                f"environment variable {JOB_SECRET} has {length} characters, must have at least "
                f"{MIN_SECRET_LENGTH} random ones: openssl rand -hex 32. Or unset it."
            )

    def gpu_ids(self, local_size: int) -> tuple[str, ...] | None:
        """Return the GPUs that CUDA_VISIBLE_DEVICES names; CUDA drops what follows a wrong id."""
        name = "CUDA_VISIBLE_DEVICES"
        if name not in self._variables:
            return None
        ids: list[str] = []
        entries = [entry.strip() for entry in self.text(name).split(",")]
        if entries == [""] or entries[0].lower() in _NO_GPU_WORDS:
            return ()
        for entry in entries:
            if entry == "-1":
                break  # CUDA ends the list here
            if not _GPU_ID.fullmatch(entry):
                self._wrong(
                    name,
                    f"of which {entry!r:.60} is no number, GPU-UUID or MIG-UUID. CUDA would pass "
                    "over it and all that follow. Take the ids from nvidia-smi -L.",
                )
                return ()
            ids.append(entry)
        if len(set(ids)) < len(ids):
            self._wrong(name, "which names a GPU twice, so that CUDA shows none. Name each once.")
        slices = [entry for entry in ids if entry.startswith("MIG-")]
        if slices and local_size > 1:
            self._wrong(
                name,
                f"which names MIG slices, but {local_size} ranks run on this node: a process sees "
                "one slice, and NCCL connects none. Use whole GPUs, or one rank.",
            )
        return tuple(ids)

    def _wrong(self, name: str, what: str) -> None:
        value = self._variables[name]
        self.problems.append(f"environment variable {name} is {value!r:.120}, {what}")


def _advice_for(name: str) -> str:
    if name.startswith("SLURM_"):
        return "Unset it."
    return "The launcher sets it: unset what a shell or job script exports, and start again."

"""Faults on purpose: named points of the run at which a test makes this very process fail.

    CPT_ALLOW_FAULTS=1 CPT_FAULT=<point>:<rank>:<step>:<action>[,...] deepspeed cpt/run.py ...

Decisions
    Without the permission nothing fires: a run that only inherits CPT_FAULT says so once and is not
    touched. Each entry fires once in a process.  The same entry twice fires at the first two
    visits. Rank and step may be `*`.  Steps are those of metrics.jsonl: the first optimizer step is
    1. The fault announces itself on stderr before it strikes, so that a test can tell a fault from
    an accident.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cpt.errors import ConfigError

POINTS = (
    "load",
    "before_first_step",
    "data",
    "forward",
    "backward",
    "gradient",
    "optimizer_step",
    "evaluate",
    "save_stage",
    "save_write",
    "save_hash",
    "save_manifest",
    "save_rename",
    "save_published",
    "prune",
    "export",
)
"""Names that `fault_point` is called with; a save passes its points in this order."""
SIGNALS = {
    "kill": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "term": signal.SIGTERM,
    "usr1": signal.SIGUSR1,
}
FACTORS = {"nan": float("nan"), "inf": float("inf")}
ACTIONS = (*SIGNALS, *FACTORS, "killgroup", "raise", "enospc", "sleep=SECONDS", "scale=FACTOR")

log = logging.getLogger("cpt.resilience.faults")


class InjectedFault(RuntimeError):
    """The error of action `raise`: an error that nobody expected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fault:
    point: str
    rank: int | None
    step: int | None
    action: str
    amount: float

    def strikes(self, point: str, step: int) -> bool:
        return self.point == point and self.step in (None, step) and self.rank in (None, _rank())


def fault_point(point: str, step: int) -> float:
    """A place where a fault may strike; one comparison if none is planned.

    Args:
        point: One of `POINTS`.
        step: The optimizer step that is being done, counted from 1; 0 before the first.

    Returns:
        What the caller multiplies its value by, where it has one to poison: 1, or the factor of a
        planned fault.

    Raises:
        InjectedFault: action `raise`.
        OSError: action `enospc`: no space left on device.
    """
    planned = _planned()
    if not planned:
        return 1.0
    assert point in POINTS, point
    for index, fault in enumerate(planned):
        if fault.strikes(point, step):
            del planned[index]
            return _strike(fault, step)
    return 1.0


def check_environment() -> None:
    """Read CPT_FAULT now; a run calls this at start so that a misspelt fault is not a test that
    passes.

    Raises:
        ConfigError: faults are allowed, and CPT_FAULT is malformed.
    """
    _planned()


@cache
def _planned() -> list[_Fault]:
    """Faults that have not fired yet."""
    text = os.environ.get("CPT_FAULT", "")
    if not text:
        return []
    if os.environ.get("CPT_ALLOW_FAULTS") != "1":
        log.warning(
            "CPT_FAULT is set, but CPT_ALLOW_FAULTS is not 1: no fault will fire. Unset it."
        )
        return []
    return [_parse(entry) for entry in text.split(",")]


def _parse(entry: str) -> _Fault:
    point, rank, step, action = (*entry.strip().split(":"), "", "", "", "")[:4]
    name, _, amount = action.partition("=")
    problems = []
    if entry.count(":") != 3:
        problems.append("must be <point>:<rank>:<step>:<action>")
    if point not in POINTS:
        problems.append(f"point '{point}' is none of {', '.join(POINTS)}")
    problems += [
        f"{key} '{value}' must be a whole number or *"
        for key, value in (("rank", rank), ("step", step))
        if value != "*" and not (value.isascii() and value.isdigit())
    ]
    known = {known.partition("=")[0]: "=" in known for known in ACTIONS}
    if known.get(name) != bool(amount) or not _is_amount(amount or "0"):
        problems.append(f"action '{action}' is none of {', '.join(ACTIONS)}")
    if problems:
        raise ConfigError(f"CPT_FAULT: '{entry}': {'; '.join(problems)}.")
    return _Fault(
        point=point,
        rank=None if rank == "*" else int(rank),
        step=None if step == "*" else int(step),
        action=name,
        amount=float(amount or 0),
    )


def _is_amount(text: str) -> bool:
    try:
        return float(text) >= 0
    except ValueError:
        return False


def _rank() -> int:
    return int(os.environ.get("RANK", "0"))


def _strike(fault: _Fault, step: int) -> float:
    announcement = (
        f"fault injected: {fault.point} rank={_rank()} step={step} action={fault.action}\n"
    )
    os.write(2, announcement.encode())  # past all buffers: the next line may kill this process
    if fault.action in FACTORS:
        return FACTORS[fault.action]
    if fault.action == "scale":
        return fault.amount
    if fault.action == "sleep":
        time.sleep(fault.amount)
    elif fault.action == "raise":
        raise InjectedFault(f"injected at {fault.point}, step {step}")
    elif fault.action == "enospc":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    elif fault.action == "killgroup":
        _kill_ranks_of_this_node()
    else:
        os.kill(os.getpid(), SIGNALS[fault.action])
    return 1.0


def _kill_ranks_of_this_node() -> None:
    """SIGKILL to every rank of this run here, this process last; ranks are known by their parent
    and their port.
    """
    port = f"MASTER_PORT={os.environ.get('MASTER_PORT', '')}".encode()
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            same_run = port in (entry / "environ").read_bytes().split(b"\0")
        except (OSError, ValueError):  # gone already, or another user's
            continue
        if parent == os.getppid() and same_run and int(entry.name) != os.getpid():
            os.kill(int(entry.name), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)

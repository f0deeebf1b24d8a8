"""Planned faults: a test makes this process fail at a named point of the run.

    CPT_ALLOW_FAULTS=1 CPT_FAULT=<point>:<rank>:<step>:<action>[,...] deepspeed cpt/run.py ...

Decisions
    Nothing fires without permission: a run that merely inherits CPT_FAULT says so once and goes on
    untouched.
    Each entry fires once in a process; an entry that is given twice fires at the first two visits.
    Rank and step may be `*`. Steps are those of metrics.jsonl: the first optimizer step is 1.
    A fault announces itself on stderr before it strikes, so that a test can tell it from an
    accident.
    The numbers of a training step never pass through this module. Faults that poison a loss or a
    gradient are hooks on the model, and `install_faults` registers them only if a fault is planned.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import time
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from cpt.errors import ConfigError
from cpt.resilience.phase import PhaseClock
from cpt.resilience.processes import environment_of, parent_of, process_ids

if TYPE_CHECKING:  # planned faults must work in a process that has not imported torch
    import torch
    from torch import nn

POINTS = (
    "load",
    "before_first_step",
    "data",
    "forward",
    "backward",
    "gradient",
    "optimizer_step",
    "rounding",
    "evaluate",
    "sample_traces",
    "save_stage",
    "save_copy",
    "save_write",
    "save_hash",
    "save_manifest",
    "save_rename",
    "save_published",
    "prune",
    "export",
    "offline_pass",
    "offline_piece",
    "offline_publish",
)
"""Points at which a fault may strike, in the order in which a run and a save pass them.

The last three are those of offline commands (cpt/offline/pieces.py), whose steps are rounds.
"""
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
    """The error that the action `raise` raises; it stands for one that nobody expected."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Fault:
    """One entry of CPT_FAULT; a rank or a step of None is any."""

    point: str
    rank: int | None
    step: int | None
    action: str
    amount: float

    def strikes(self, point: str, step: int) -> bool:
        return self.point == point and self.step in (None, step) and self.rank in (None, _rank())


def fault_point(point: str, step: int) -> None:
    """Let a planned fault strike here. Without one this costs a single comparison.

    Args:
        point: One of `POINTS`.
        step: The optimizer step in progress, counted from 1; 0 before the first.

    Raises:
        InjectedFault: the planned action is `raise`.
        OSError: the planned action is `enospc` (no space left on device).
    """
    if _planned():
        _visit(point, step)


def install_faults(model: nn.Module, clock: PhaseClock) -> None:
    """Let the faults planned at `forward`, `backward` and `gradient` strike in training passes.

    `nan`, `inf` and `scale` multiply the losses at `forward`, which poisons their gradients, too.
    At `gradient` they multiply only the gradients, and the loss stays what it is. Passes without
    gradients are left alone.

    Args:
        model: A module that returns the losses; it is changed only if a fault is planned.
        clock: Knows the optimizer step in progress.

    Raises:
        InjectedFault: during a training pass, if the planned action is `raise`.
        OSError: during a training pass, if the planned action is `enospc`.
    """
    if not _planned():
        return

    def strike_in_backward(gradient: torch.Tensor) -> torch.Tensor:
        step = clock.now().step
        _visit("backward", step)
        return gradient * _visit("gradient", step)

    def strike_in_forward(module: nn.Module, inputs: Any, losses: torch.Tensor) -> torch.Tensor:
        if not losses.requires_grad:
            return losses
        struck = losses * _visit("forward", clock.now().step)
        struck.register_hook(strike_in_backward)
        return struck

    model.register_forward_hook(strike_in_forward)


def _visit(point: str, step: int) -> float:
    """Fire the first fault planned for this visit; return the factor it has for numbers, or 1."""
    planned = _planned()
    assert point in POINTS, point
    for index, fault in enumerate(planned):
        if fault.strikes(point, step):
            del planned[index]
            return _strike(fault, step)
    return 1.0


def check_environment() -> None:
    """Read CPT_FAULT at the start of a run, so that a misspelled fault is no test that passes.

    Raises:
        ConfigError: faults are allowed and CPT_FAULT is malformed.
    """
    _planned()


@cache
def _planned() -> list[_Fault]:
    """Return the list of faults that have not fired yet; the caller removes those that fire."""
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
    for key, value in (("rank", rank), ("step", step)):
        if value != "*" and not (value.isascii() and value.isdigit()):
            problems.append(f"{key} '{value}' must be a whole number or *")
    if not _is_action(name, amount):
        problems.append(f"action '{action}' is none of {', '.join(ACTIONS)}")
    if problems:
        raise ConfigError(f"CPT_FAULT: '{entry}': {'; '.join(problems)}.")
    return _Fault(
        point=point,
        rank=_number_or_any(rank),
        step=_number_or_any(step),
        action=name,
        amount=float(amount or 0),
    )


def _number_or_any(text: str) -> int | None:
    if text == "*":
        return None
    return int(text)


def _is_action(name: str, amount: str) -> bool:
    """Return whether an action of this name exists and takes an amount if there is one."""
    for action in ACTIONS:
        known_name, _, known_amount = action.partition("=")
        if name == known_name:
            return bool(known_amount) == bool(amount) and _is_amount(amount or "0")
    return False


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
    """Send SIGKILL to every rank of this run on this node, to this process last.

    Ranks of one run have the same parent and the same port.
    """
    port = f"MASTER_PORT={os.environ.get('MASTER_PORT', '')}"
    for pid in process_ids():
        is_sibling = pid != os.getpid() and parent_of(pid) == os.getppid()
        if is_sibling and port in environment_of(pid):
            os.kill(pid, signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)

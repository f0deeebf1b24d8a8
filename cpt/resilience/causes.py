"""The ruling that each cause leads to: what is said, who is to blame, and the exit code of all."""

from __future__ import annotations

from collections.abc import Sequence

from cpt.errors import CptError, HungRankError, InternalError, cause_and_code
from cpt.resilience.heartbeat import Beat, Hang, Observer, Process
from cpt.resilience.neighbors import Death, describe_kill
from cpt.resilience.ruling import PASSED_ON, SIGNAL_CODE, Ruling, failure_code


def ruling_on_error(error: Exception, rank: int, location: str, process: Process) -> Ruling:
    """Return the ruling of a rank whose main thread has met an error of its own.

    Args:
        error: The error.
        rank: This rank.
        location: The phase and the step.
        process: This process.
    """
    cause, code = cause_and_code(error)
    return Ruling(
        kind="failed",
        rank=rank,
        code=failure_code(code),
        text=f"rank {rank} failed in {location}: {cause}",
        agreed=isinstance(error, CptError),
        host=process.host,
        node=process.node,
    )


def ruling_on_kill(death: Death, step: int, cause: str, process: Process) -> Ruling:
    """Return the ruling about a rank of this node that a signal has ended.

    Args:
        death: Its end.
        step: The optimizer step in progress.
        cause: What the kernel's counts say about a SIGKILL.
        process: This process.
    """
    return Ruling(
        kind="killed",
        rank=death.rank,
        code=SIGNAL_CODE + death.signal,
        text=describe_kill(death, node=process.node, step=step, cause=cause),
        host=process.host,
        node=process.node,
        signal=death.signal,
    )


def ruling_on_wordless_end(death: Death, process: Process) -> Ruling:
    """Return the ruling about a rank of this node that has ended by itself and said nothing."""
    how = "in an unknown way" if death.code is None else f"with exit code {death.code}"
    return Ruling(
        kind="killed",
        rank=death.rank,
        code=death.code if death.code in PASSED_ON else InternalError.exit_code,
        text=(
            f"rank {death.rank} (process {death.pid} on {process.node}) ended {how} "
            "and said nothing; the lines above may say why."
        ),
        host=process.host,
        node=process.node,
    )


def ruling_on_silence(lost: Sequence[int], observer: Observer) -> Ruling:
    """Return the ruling about ranks that give no sign of life."""
    beat = observer.beat_of(lost[0])
    return Ruling(
        kind="killed",
        rank=lost[0],
        code=HungRankError.exit_code,
        text=f"{observer.describe_lost(lost)}.",
        host=beat.host,
        node=beat.node,
    )


def ruling_on_hang(hang: Hang, beats: Sequence[Beat]) -> Ruling:
    """Return the ruling of rank 0 about ranks that hang.

    Args:
        hang: The ranks.
        beats: The newest beat of every rank, by rank.
    """
    first = beats[hang.ranks[0]] if hang.ranks else None
    return Ruling(
        kind="hung",
        rank=0,
        code=HungRankError.exit_code,
        text=hang.text,
        hung_ranks=tuple(hang.ranks),
        host="" if first is None else first.host,
        node="" if first is None else first.node,
    )


def ruling_on_dead_store(rank: int, first: Beat | None, seconds: float, error: str) -> Ruling:
    """Return the ruling of a rank that cannot ask anybody, because rank 0 does not answer.

    Args:
        rank: This rank.
        first: The newest beat of rank 0; None if it was never seen.
        seconds: How long the store has not answered.
        error: What its connection said; empty if nothing.
    """
    seen = "never seen" if first is None else f"last seen in {first.location()}"
    text = f"rank 0, which holds the store, {seen}, has not answered for {seconds:.0f} s. {error}"
    return Ruling(
        kind="hung",
        rank=rank,
        code=HungRankError.exit_code,
        text=text.strip(),
        hung_ranks=() if first is None else (0,),
        host="" if first is None else first.host,
        node="" if first is None else first.node,
    )

"""Work that is spread over processes.

Decisions
    Processes are spawned, not forked: the caller may hold threads or a GPU.
    A worker dies with its parent, however the parent dies, so a killed build leaves no process that
    still writes.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from data_pipeline.errors import CptError

_PR_SET_PDEATHSIG = 1
"""Option of prctl(2) that sets the signal a process gets when its parent dies."""
Item = TypeVar("Item")
Result = TypeVar("Result")


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def spread(
    work: Callable[[Item], Result], items: Sequence[Item], workers: int
) -> Iterator[tuple[Item, Result]]:
    """Yield (item, result) of each item as it is done; in this process if one worker is enough.

    Raises:
        CptError: `work` raised it, or a worker died.
    """
    if workers <= 1 or len(items) <= 1:
        for item in items:
            yield item, work(item)
        return
    pool = concurrent.futures.ProcessPoolExecutor(
        min(workers, len(items)),
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_follow_parent,
        initargs=(os.getpid(),),
    )
    try:
        futures = {pool.submit(work, item): item for item in items}
        for future in concurrent.futures.as_completed(futures):
            yield futures[future], future.result()
    except BrokenProcessPool as error:
        raise CptError(
            "A worker process died. If the kernel killed it for lack of memory, use fewer "
            "--workers; what is done is kept, and a rerun goes on from there."
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _follow_parent(parent: int) -> None:
    """Let this process die with its parent, and leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

"""Tasks on the cores of this machine.

Decisions
    Processes are spawned, not forked: the caller may hold threads or a GPU. They are started when
    they are first needed, and stay for the runs after it.
    A worker dies with its parent, however the parent dies, so a killed build leaves no process that
    still writes.
    Few tasks per worker wait or have results that nobody took, so the parent's memory depends on
    the number of workers and not on the number of tasks.
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

from data_pipeline.engine.executor import Executor, Item, Result
from data_pipeline.errors import CptError

SUBMITTED_PER_WORKER = 2
"""Tasks per worker that are submitted at once: one that runs, and one that waits for it."""
_PR_SET_PDEATHSIG = 1
"""Option of prctl(2) that sets the signal a process gets when its parent dies."""


def available_cores() -> int:
    """Return the number of cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class LocalExecutor(Executor):
    """Runs tasks in processes of this machine; in this process if one worker is enough."""

    def __init__(self, num_workers: int = 1) -> None:
        self.num_workers = max(num_workers, 1)
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def run(
        self,
        work: Callable[[Item], Result],
        items: Sequence[Item],
    ) -> Iterator[tuple[Item, Result]]:
        """Yield (item, result) of each item as it is done; see `Executor`."""
        if self.num_workers == 1 or len(items) <= 1:
            for item in items:
                yield item, work(item)
            return
        try:
            yield from self._run_in_pool(self._open_pool(), work, items)
        except BrokenProcessPool as error:
            self._pool = None
            raise CptError(
                "A worker process died. If the kernel killed it for lack of memory, use fewer "
                "--workers; what is done is kept, and a rerun goes on from there."
            ) from error

    def close(self) -> None:
        """End the workers; tasks that have begun are waited for."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def _open_pool(self) -> concurrent.futures.ProcessPoolExecutor:
        if self._pool is None:
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self.num_workers,
                mp_context=multiprocessing.get_context("spawn"),
                initializer=_follow_parent,
                initargs=(os.getpid(),),
            )
        return self._pool

    def _run_in_pool(
        self,
        pool: concurrent.futures.ProcessPoolExecutor,
        work: Callable[[Item], Result],
        items: Sequence[Item],
    ) -> Iterator[tuple[Item, Result]]:
        """Yield (item, result) as they are done, with a bounded number of tasks under way."""
        max_submitted = SUBMITTED_PER_WORKER * self.num_workers
        submitted: dict[concurrent.futures.Future[Result], Item] = {}
        waiting = iter(items)
        try:
            while True:
                for item in waiting:
                    submitted[pool.submit(work, item)] = item
                    if len(submitted) == max_submitted:
                        break
                if not submitted:
                    return
                future = _first_done(submitted)
                done_item = submitted.pop(future)
                result = future.result()
                del future  # it holds the result, which the caller may drop
                yield done_item, result
                del result
        finally:
            for future in submitted:
                future.cancel()


def _first_done(
    submitted: dict[concurrent.futures.Future[Result], Item],
) -> concurrent.futures.Future[Result]:
    """Return a task that is done, or wait for the first."""
    for future in submitted:
        if future.done():
            return future
    concurrent.futures.wait(submitted, return_when=concurrent.futures.FIRST_COMPLETED)
    return _first_done(submitted)


def _follow_parent(parent: int) -> None:
    """Let this process die with its parent, and leave Ctrl-C to the parent."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)

"""Ranks of one group as threads of this process: all-to-alls between them, and what each did.

An asynchronous exchange leaves its rows when it is started and fetches those of others when it is
waited for, as on a network that is slow.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist

from cpt.parallel.traffic import Traffic

T = TypeVar("T")
PATIENCE_SECONDS = 60


class _Work:
    """An exchange that was started."""

    def __init__(self, fetch: Callable[[], None]) -> None:
        self._fetch = fetch

    def wait(self) -> None:
        """Fetch the rows of the other ranks."""
        self._fetch()


class ThreadedRanks:
    """A group whose ranks are threads; an instance also stands in for the process group."""

    def __init__(self, size: int, patch: pytest.MonkeyPatch) -> None:
        self.size = size
        self.events: list[list[str]] = [[] for _ in range(size)]
        """What each rank did, in order: `start NUMBER`, `wait NUMBER`, and what `note` adds."""
        self.traffic = [Traffic() for _ in range(size)]
        self._here = threading.local()
        self._posted: dict[tuple[int, int], list[torch.Tensor]] = {}
        self._shown: dict[tuple[int, int], torch.Tensor] = {}
        self._changed = threading.Condition()
        patch.setattr(dist, "all_to_all_single", self._all_to_all)
        patch.setattr(dist, "all_gather", self._all_gather)
        patch.setattr(dist, "all_reduce", self._all_reduce)
        patch.setattr(dist, "get_world_size", lambda group=None: size)
        patch.setattr(dist, "get_rank", lambda group=None: self._here.rank)

    def run(self, call: Callable[[int], T]) -> list[T]:
        """Return what `call(rank)` returns on every rank, all at the same time."""
        results: dict[int, T] = {}
        errors: list[Exception] = []

        def work(rank: int) -> None:
            self._here.rank = rank
            self._here.calls = Counter()
            try:
                results[rank] = call(rank)
            except Exception as error:
                errors.append(error)

        self._posted.clear()
        self._shown.clear()
        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return [results[rank] for rank in range(self.size)]

    def note(self, event: str) -> None:
        """Add an event to those of the rank that calls."""
        self.events[self._here.rank].append(event)

    def _all_to_all(
        self,
        output: torch.Tensor,
        sent: torch.Tensor,
        output_split_sizes: list[int] | None = None,
        input_split_sizes: list[int] | None = None,
        group: Any = None,
        async_op: bool = False,
    ) -> _Work | None:
        rank = self._here.rank
        self._here.calls["all_to_all"] += 1
        number = self._here.calls["all_to_all"]
        equal = sent.shape[0] // self.size
        parts = sent.clone().split(input_split_sizes or [equal] * self.size)
        with self._changed:
            self._posted[number, rank] = list(parts)
            self._changed.notify_all()
        wanted = output_split_sizes or [equal] * self.size

        def fetch() -> None:
            for origin, place in enumerate(output.split(wanted)):
                place.copy_(self._fetch(number, origin)[rank])

        if not async_op:
            fetch()
            return None
        self.note(f"start {number}")

        def wait() -> None:
            self.note(f"wait {number}")
            fetch()

        return _Work(wait)

    def _all_gather(self, outputs: list[torch.Tensor], own: torch.Tensor, group: Any) -> None:
        self._here.calls["shown"] += 1
        number = self._here.calls["shown"]
        with self._changed:
            self._shown[number, self._here.rank] = own.clone()
            self._changed.notify_all()
            for rank, output in enumerate(outputs):
                key = (number, rank)
                if not self._changed.wait_for(lambda key=key: key in self._shown, PATIENCE_SECONDS):
                    raise TimeoutError(f"rank {rank} never came to meeting {number}")
                output.copy_(self._shown[key])

    def _all_reduce(
        self, own: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None
    ) -> None:
        found = [torch.empty_like(own) for _ in range(self.size)]
        self._all_gather(found, own, group)
        stacked = torch.stack(found)
        own.copy_(stacked.amax(0) if op == dist.ReduceOp.MAX else stacked.sum(0))

    def _fetch(self, number: int, origin: int) -> list[torch.Tensor]:
        key = (number, origin)
        with self._changed:
            if not self._changed.wait_for(lambda: key in self._posted, PATIENCE_SECONDS):
                raise TimeoutError(f"rank {origin} never started its exchange {number}")
            return self._posted[key]

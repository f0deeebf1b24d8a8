"""The two runs of a checkpointed layer, and what the second one need not do again.

torch runs a checkpointed layer again in the backward pass. It takes from that second run only what
autograd saves and drops its output. So the second run needs the rows that an exchange brought, but
nothing that is sent back, and it may take those rows from the first run if they were kept. torch's
`context_fn` tells the two runs apart.

Decisions
    - One `Recomputation` per checkpointed call holds what its first run kept. Its second run takes
      it in the same order, and the memory is free again after the layer's backward.
    - The second run may happen on another thread (autograd's, on a GPU), so the current call is
      noted per thread.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch

from cpt.errors import InternalError

_current = threading.local()


class Recomputation:
    """One checkpointed call, through its first run and its second."""

    def __init__(self, *, keep: bool) -> None:
        self.keep = keep
        self.is_second = False
        self._kept: deque[object] = deque()

    @contextmanager
    def _run(self, *, second: bool) -> Iterator[None]:
        outer = current()
        self.is_second = second
        _current.value = self
        try:
            yield
        finally:
            _current.value = outer

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return what torch enters around the first run and around the second."""
        return self._run(second=False), self._run(second=True)

    def put(self, value: object) -> None:
        """Keep a value of the first run; a tensor must be detached, or its graph never dies."""
        self._kept.append(value)

    def take(self) -> Any:
        """Return the next value that the first run kept.

        Raises:
            InternalError: None is left, because a second backward went through the same graph.
        """
        if not self._kept:
            raise InternalError(
                "a checkpointed layer was recomputed twice; with model.expert_recompute: keep it "
                "can be only once."
            )
        return self._kept.popleft()


def current() -> Recomputation | None:
    """Return the checkpointed call that is running on this thread, if any."""
    return getattr(_current, "value", None)


def is_second_run() -> bool:
    """Return whether this is a recomputation, whose output nobody reads."""
    running = current()
    return running is not None and running.is_second


def unread(like: torch.Tensor, num_rows: int, size: int) -> torch.Tensor:
    """Return zeros (num_rows, size) that take no memory: an output of a recomputation."""
    return like.new_zeros(1, 1).expand(num_rows, size)


def context_fn(
    *, keep: bool
) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
    """Return the argument `context_fn` for `torch.utils.checkpoint`."""
    return lambda: Recomputation(keep=keep).contexts()

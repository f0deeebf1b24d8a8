"""All-to-all as an autograd operation: the backward of an exchange is the exchange with both sides
swapped.
"""

from __future__ import annotations

from typing import Any, Self

import torch
import torch.distributed as dist

from cpt.parallel.traffic import Kind, Traffic


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: torch.Tensor,
        send: list[int],
        receive: list[int],
        group: dist.ProcessGroup,
        traffic: Traffic,
        kind: Kind,
    ) -> torch.Tensor:
        ctx.plan = receive, send, group, traffic, kind
        row_bytes = rows[0].numel() * rows.element_size() if rows.shape[0] else 0
        traffic.add(kind, (sum(send) - send[dist.get_rank(group)]) * row_bytes)
        received = rows.new_empty((sum(receive), *rows.shape[1:]))
        dist.all_to_all_single(received, rows.contiguous(), receive, send, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return _AllToAll.apply(grads[0], *ctx.plan), None, None, None, None, None


class _Start(torch.autograd.Function):
    """Begin an exchange; its backward ends the exchange of the gradients that `_Finish` began."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, pending: Pending) -> torch.Tensor:
        ctx.pending = pending
        return pending.begin(rows, pending.send, pending.receive)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.pending.end(), None


class _Finish(torch.autograd.Function):
    """End an exchange; its backward begins the exchange of the gradients."""

    @staticmethod
    def forward(ctx: Any, arriving: torch.Tensor, pending: Pending) -> torch.Tensor:
        ctx.pending = pending
        return pending.end()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        # what flows on is a stand-in of the right shape: the gradient itself is fetched where the
        # exchange ends
        ctx.pending.begin(grads[0], ctx.pending.receive, ctx.pending.send)
        return grads[0], None


class Pending:
    """An exchange on its way: what is computed between `start_all_to_all` and `finish` overlaps
    with it.

    Backward too: autograd runs nodes in reverse order of their creation, so the gradients leave
    first, then the backward of what was computed in between runs, then their arrival is awaited.
    """

    def __init__(
        self,
        send: list[int],
        receive: list[int],
        group: dist.ProcessGroup,
        traffic: Traffic,
        kind: Kind,
    ) -> None:
        self.send, self.receive = send, receive
        self._group, self._traffic, self._kind = group, traffic, kind
        self._work: dist.Work | None = None
        self._buffers: tuple[torch.Tensor, ...] = ()
        self._arriving: torch.Tensor | None = None

    def start(self, rows: torch.Tensor) -> Self:
        """Send `rows`; see `start_all_to_all`."""
        self._arriving = _Start.apply(rows, self)
        return self

    def finish(self) -> torch.Tensor:
        """Wait and return the rows received."""
        arriving, self._arriving = self._arriving, None
        return _Finish.apply(arriving, self)

    def begin(self, rows: torch.Tensor, send: list[int], receive: list[int]) -> torch.Tensor:
        """Start one direction; returns the buffer that is being filled."""
        row_bytes = rows[0].numel() * rows.element_size() if rows.shape[0] else 0
        self._traffic.add(self._kind, (sum(send) - send[dist.get_rank(self._group)]) * row_bytes)
        outgoing, incoming = rows.contiguous(), rows.new_empty((sum(receive), *rows.shape[1:]))
        self._work = dist.all_to_all_single(
            incoming, outgoing, receive, send, group=self._group, async_op=True
        )
        self._buffers = incoming, outgoing  # both must live until the exchange is over
        return incoming

    def end(self) -> torch.Tensor:
        """Wait for the direction that was started."""
        assert self._work is not None, "an exchange was awaited that was never started"
        self._work.wait()
        incoming, self._buffers, self._work = self._buffers[0], (), None
        return incoming


def start_all_to_all(
    rows: torch.Tensor,
    send: list[int],
    receive: list[int],
    *,
    group: dist.ProcessGroup,
    traffic: Traffic,
    kind: Kind,
) -> Pending:
    """Begin what `all_to_all` does and return at once; the arguments are the same."""
    return Pending(send, receive, group, traffic, kind).start(rows)


def all_to_all(
    rows: torch.Tensor,
    send: list[int],
    receive: list[int],
    *,
    group: dist.ProcessGroup,
    traffic: Traffic,
    kind: Kind,
) -> torch.Tensor:
    """Send `send[i]` consecutive rows to rank i of the group and receive `receive[i]` rows from it.

    Args:
        rows: (sum(send), ...) ordered by destination.
        send: Rows for each rank of the group.
        receive: Rows from each rank of the group.
        group: The ranks that exchange.
        traffic: Counts the bytes that leave this rank.
        kind: What to count them as.

    Returns:
        (sum(receive), ...) ordered by origin.
    """
    return _AllToAll.apply(rows, send, receive, group, traffic, kind)

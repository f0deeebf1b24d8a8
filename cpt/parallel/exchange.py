"""All-to-all as an autograd operation: the backward of an exchange is the exchange reversed.

    all_to_all          waits:     rows -> Transfer -> rows received
    start_all_to_all    returns:   rows -> _Start -> (compute what needs no arrival) -> finish()
    Transfer            one direction alone, for who writes the backward by hand

Autograd runs nodes in reverse order of their creation. So in the backward of the second form the
gradients leave first (in `_Finish`), then the backward of what was computed in between runs, and
then their arrival is awaited (in `_Start`).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from cpt.parallel.traffic import Kind, Traffic


class Route(NamedTuple):
    """The numbers of rows that travel between the ranks of a group."""

    send: list[int]
    """Rows for each rank of the group."""
    receive: list[int]
    """Rows from each rank of the group."""
    group: dist.ProcessGroup
    """The ranks that exchange."""
    traffic: Traffic
    """The counter of the bytes that leave this rank."""
    kind: Kind
    """Kind under which the bytes are counted."""

    def reversed(self) -> Route:
        """Return the way back, which the gradients take."""
        return self._replace(send=self.receive, receive=self.send)


class Transfer:
    """One direction of an exchange: the constructor starts it, `wait` ends it."""

    def __init__(
        self,
        rows: torch.Tensor,
        route: Route,
        *,
        async_op: bool,
        into: torch.Tensor | None = None,
    ) -> None:
        """Start to send `rows`; what arrives is written to `into`, by default to a new tensor."""
        self._count_bytes(rows, route)
        # Both buffers must live until the exchange is over.
        self._outgoing = rows.contiguous()
        if into is None:
            into = rows.new_empty((sum(route.receive), *rows.shape[1:]))
        self.incoming = into
        self._work = dist.all_to_all_single(
            self.incoming,
            self._outgoing,
            route.receive,
            route.send,
            group=route.group,
            async_op=async_op,
        )

    @staticmethod
    def _count_bytes(rows: torch.Tensor, route: Route) -> None:
        if rows.shape[0] == 0:
            return
        row_bytes = rows[0].numel() * rows.element_size()
        rows_for_others = sum(route.send) - route.send[dist.get_rank(route.group)]
        route.traffic.add(route.kind, rows_for_others * row_bytes)

    def wait(self) -> torch.Tensor:
        """Return the rows received."""
        if self._work is not None:
            self._work.wait()
        return self.incoming


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, route: Route) -> torch.Tensor:
        ctx.route = route
        return Transfer(rows, route, async_op=False).wait()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _AllToAll.apply(grads[0], ctx.route.reversed()), None


class Pending:
    """An exchange on its way; what is computed before `finish` overlaps with it."""

    def __init__(self, rows: torch.Tensor, route: Route) -> None:
        self._route = route
        self._transfer: Transfer | None = None
        self._arriving: torch.Tensor | None = _Start.apply(rows, self)

    def finish(self) -> torch.Tensor:
        """Wait and return the rows received."""
        arriving = self._arriving
        self._arriving = None
        return _Finish.apply(arriving, self)

    def send_rows(self, rows: torch.Tensor) -> torch.Tensor:
        """Start the way there and return the buffer that is being filled."""
        return self._start(rows, self._route)

    def send_gradients(self, grads: torch.Tensor) -> None:
        """Start the way back."""
        self._start(grads, self._route.reversed())

    def _start(self, rows: torch.Tensor, route: Route) -> torch.Tensor:
        self._transfer = Transfer(rows, route, async_op=True)
        return self._transfer.incoming

    def wait(self) -> torch.Tensor:
        """Wait for the direction that was started and return what arrived."""
        transfer = self._transfer
        assert transfer is not None, "an exchange was awaited that was never started"
        self._transfer = None
        return transfer.wait()


class _Start(torch.autograd.Function):
    """Send the rows; in the backward, await the gradients that `_Finish` sent."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, pending: Pending) -> torch.Tensor:
        ctx.pending = pending
        return pending.send_rows(rows)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.pending.wait(), None


class _Finish(torch.autograd.Function):
    """Await the rows; in the backward, send the gradients."""

    @staticmethod
    def forward(ctx: Any, arriving: torch.Tensor, pending: Pending) -> torch.Tensor:
        ctx.pending = pending
        return pending.wait()

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        ctx.pending.send_gradients(grads[0])
        # Only the shape of what flows on matters: `_Start` fetches the gradient that arrives.
        return grads[0], None


def start_all_to_all(rows: torch.Tensor, route: Route) -> Pending:
    """Begin what `all_to_all` does and return at once."""
    return Pending(rows, route)


def all_to_all(rows: torch.Tensor, route: Route) -> torch.Tensor:
    """Send `route.send[i]` consecutive rows to rank i of the group, and receive as planned.

    Args:
        rows: (sum(send), ...) ordered by destination.
        route: How many rows go where.

    Returns:
        (sum(receive), ...) ordered by origin.
    """
    return _AllToAll.apply(rows, route)

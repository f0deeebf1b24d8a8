"""All-to-all as an autograd operation: the backward of an exchange is the exchange with both sides swapped."""

from __future__ import annotations

from typing import Any

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

"""Acting on a request to stop: all ranks learn of it, and all leave at the same point."""

from __future__ import annotations

import torch.distributed as dist

from cpt.errors import RequeueRequested
from cpt.parallel.agreement import gather_json
from cpt.resilience.stop import StopRequest


def agreed_reason(stop: StopRequest, group: dist.ProcessGroup) -> str:
    """Why some rank wants to stop, the same on all ranks; empty if none does."""
    reasons = gather_json(stop.reason(), group)
    return next((f"{reason} (rank {rank})" for rank, reason in enumerate(reasons) if reason), "")


def leave_if_asked(stop: StopRequest, group: dist.ProcessGroup, where: str) -> None:
    """Leave at a point where there is nothing to save.

    Raises:
        RequeueRequested: on all ranks, if any has been asked to stop.
    """
    if reason := agreed_reason(stop, group):
        stop.consume()
        raise RequeueRequested(
            f"stopped on request {where}: {reason}. There was nothing to save; start again."
        )

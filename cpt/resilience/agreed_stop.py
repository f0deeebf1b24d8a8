"""Agreement on a request to stop: all ranks learn of it and leave at the same point."""

from __future__ import annotations

import torch.distributed as dist

from cpt.errors import RequeueRequested
from cpt.parallel.agreement import gather_json
from cpt.resilience.stop import StopRequest


def agreed_reason(stop: StopRequest, group: dist.ProcessGroup) -> str:
    """Return why some rank wants to stop, the same on all ranks; an empty string if none does."""
    reasons = gather_json(stop.reason(), group)
    for rank, reason in enumerate(reasons):
        if reason:
            return f"{reason} (rank {rank})"
    return ""


def leave_if_asked(stop: StopRequest, group: dist.ProcessGroup, where: str) -> None:
    """Leave on request at a point of the run where there is nothing to save.

    Raises:
        RequeueRequested: on all ranks, if any of them has been asked to stop.
    """
    reason = agreed_reason(stop, group)
    if reason:
        stop.consume()
        raise RequeueRequested(
            f"stopped on request {where}: {reason}. There was nothing to save; start again."
        )

"""How long a rank waits in a collective, or for a key of the store, before torch ends it.

torch's limits are 10 minutes over NCCL, where the rank that waits is aborted, and 30 over gloo. It
names nobody, and the rank that is ended is not the one at fault. Where a watchdog looks for that
one, these limits must come after it.

DeepSpeed makes groups without a limit of its own, also later than ours, so the value is changed
that torch takes for such groups. The limit of the store counts until NCCL has connected a group.

Read in torch 2.13, distributed/distributed_c10d.py, and in an older one with the same names. NCCL
work takes the limit of its group when it is begun.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed import distributed_c10d

LONGEST = timedelta(days=20)
"""Milliseconds of a longer limit do not fit into 31 bits."""
_DEFAULTS = ("default_pg_timeout", "default_pg_nccl_timeout")


def wait_at_least(seconds: float) -> None:
    """Raise the limits of this process's groups, of those that are made later, and of the store.

    A limit that is longer already stays as it is. All ranks call this, since the first rank whose
    limit is over ends the run.

    Args:
        seconds: The limit; at most `LONGEST` of it.
    """
    limit = timedelta(seconds=min(seconds, LONGEST.total_seconds()))
    for name in _DEFAULTS:
        present = getattr(distributed_c10d, name)
        if present is not None and present < limit:  # None: torch was built without NCCL
            setattr(distributed_c10d, name, limit)
    for group in list(distributed_c10d._world.pg_map):
        _raise_limit(group, limit)
    store: Any = distributed_c10d._get_default_store()
    if store.timeout < limit:
        store.set_timeout(limit)


def limit_of(group: dist.ProcessGroup) -> timedelta:
    """Return the shortest limit of a group's backends."""
    return min(backend.options._timeout for backend in _backends(group))


def _raise_limit(group: dist.ProcessGroup, limit: timedelta) -> None:
    for backend in _backends(group):
        if backend.options._timeout < limit:
            backend._set_default_timeout(limit)


def _backends(group: dist.ProcessGroup) -> list[Any]:
    """Return what carries out a group's collectives, for each kind of device.

    Not all that is used of it is in torch's stubs.
    """
    found: list[Any] = []
    for device in group._device_types:
        backend = group._get_backend(device)
        # TORCH_DISTRIBUTED_DEBUG=DETAIL puts a wrapper around it
        found.append(getattr(backend, "wrapped_pg", backend))
    return found

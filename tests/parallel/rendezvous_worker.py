"""Two ranks that meet as those of a run do, and look which addresses the port is open on."""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist

from cpt.deepspeed_adapter.groups import init_distributed

LISTENS = "0A"
"""State of a listening socket in /proc/net/tcp (proc(5))."""


def listening_addresses(port: int) -> list[str]:
    """Return the local addresses, as the kernel writes them, on which a port is open."""
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *_ = line.split()
            address, _, number = local.partition(":")
            if state == LISTENS and int(number, 16) == port:
                found.append(address)
    return found


if __name__ == "__main__":
    init_distributed(torch.device("cpu"))
    total = torch.ones(1)
    dist.all_reduce(total)
    assert total.item() == 2
    found = listening_addresses(int(os.environ["MASTER_PORT"]))
    assert found == ["0100007F"], found
    dist.barrier()
    dist.destroy_process_group()

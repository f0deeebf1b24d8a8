"""The port at which the ranks meet, open on one address of rank 0's node and not on all.

torch's store listens on every interface, whatever MASTER_ADDR is (c10d TCPStore, torch 2.13). It
takes a socket that listens already (`master_listen_fd`), so rank 0 opens one itself.

    MASTER_ADDR=127.0.0.1, as of `deepspeed` on one node   the loopback device
    another address of this node, as a number              the interface that has it
    a name, or an address that this node has not           every interface: a name may mean another
                                                           address on the other nodes
torchrun opens the port by itself, on every interface.
"""

from __future__ import annotations

import contextlib
import ipaddress
import os
import socket
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import parse_qs, urlsplit

import torch.distributed as dist
from torch.distributed.distributed_c10d import default_pg_timeout
from torch.distributed.rendezvous import register_rendezvous_handler

_SCHEME = "cpt-listen"
_BACKLOG = 2048


def init_method() -> str | None:
    """Return how this rank shall join the process group; None for torch's own way.

    The way of the other ranks is torch's: they connect to MASTER_ADDR.

    Raises:
        OSError: the port is in use.
    """
    is_first = os.environ.get("RANK") == "0"
    is_opened_by_launcher = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if not is_first or is_opened_by_launcher or dist.is_initialized():
        return None
    address = _number_of(os.environ.get("MASTER_ADDR", ""))
    if address is None:
        return None
    listening = _listen(address, int(os.environ["MASTER_PORT"]))
    if listening is None:
        return None
    with contextlib.suppress(RuntimeError):  # it is registered already
        register_rendezvous_handler(_SCHEME, _meet)
    return f"{_SCHEME}://?listen={listening.detach()}"


def _number_of(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    """Return an address that is written as a number; None for a name."""
    try:
        return ipaddress.ip_address(address.strip())
    except ValueError:
        return None


def _listen(
    address: ipaddress.IPv4Address | ipaddress.IPv6Address, port: int
) -> socket.socket | None:
    """Return a socket that listens on an address; None if this node has not that address."""
    family = socket.AF_INET if address.version == 4 else socket.AF_INET6
    # looked at first, because a port that is in use is an error and an address elsewhere is none
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((str(address), 0))
        except OSError:
            return None
    return socket.create_server((str(address), port), family=family, backlog=_BACKLOG)


def _meet(
    url: str, timeout: timedelta = default_pg_timeout, **_: Any
) -> Iterator[tuple[dist.Store, int, int]]:
    """Open the store of rank 0 on a socket that listens; see `_create_c10d_store` of torch."""
    descriptor = int(parse_qs(urlsplit(url).query)["listen"][0])
    world_size = int(os.environ["WORLD_SIZE"])
    store = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        world_size=world_size,
        is_master=True,
        timeout=timeout,
        multi_tenant=True,
        master_listen_fd=descriptor,
    )
    yield store, 0, world_size
    raise RuntimeError("the ranks of a run meet once")

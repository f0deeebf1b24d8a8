"""The port at which ranks meet is open on one address, so that other machines do not reach it."""

from __future__ import annotations

import errno
import socket
from pathlib import Path

import pytest

from cpt.parallel import rendezvous
from tests.support.launcher import free_port, launch

WORKER = Path(__file__).with_name("rendezvous_worker.py")


def test_ranks_of_one_node_meet_on_the_loopback_device_only() -> None:
    """torch would listen on every interface."""
    assert launch(WORKER, 2, []) == [0, 0]


@pytest.fixture
def first_rank(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(free_port()))
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RANK", "1"),
        ("MASTER_ADDR", "node-1"),
        ("MASTER_ADDR", "localhost"),
        ("MASTER_ADDR", "203.0.113.9"),
        ("TORCHELASTIC_USE_AGENT_STORE", "True"),
    ],
    ids=["another-rank", "name", "localhost", "address-of-another-node", "torchrun"],
)
def test_port_is_left_to_torch(first_rank: pytest.MonkeyPatch, name: str, value: str) -> None:
    first_rank.setenv(name, value)
    assert rendezvous.init_method() is None


def test_port_in_use_is_an_error(first_rank: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        first_rank.setenv("MASTER_PORT", str(taken.getsockname()[1]))
        with pytest.raises(OSError) as error:
            rendezvous.init_method()
    assert error.value.errno == errno.EADDRINUSE

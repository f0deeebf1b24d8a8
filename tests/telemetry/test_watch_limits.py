"""No client fills the server of `cpt watch`: too many, too slow, too large."""

from __future__ import annotations

import asyncio
import socket

import pytest
import tornado.netutil
import tornado.web

from cpt.telemetry.watch import bounded_server
from cpt.telemetry.watch.bounded_server import BoundedServer


class Greeting(tornado.web.RequestHandler):
    def get(self) -> None:
        self.write("hello")


async def answers(*requests: bytes | None) -> list[bytes]:
    """Send each request over a connection of its own, all open together; None sends nothing."""
    server = BoundedServer(tornado.web.Application([("/", Greeting)]))
    sockets = tornado.netutil.bind_sockets(0, "127.0.0.1", family=socket.AF_INET)
    server.add_sockets(sockets)
    opened = []
    for request in requests:
        reader, writer = await asyncio.open_connection(*sockets[0].getsockname())
        writer.write(request or b"")
        opened.append((reader, writer))
        await asyncio.sleep(0.05)  # in this order
    found = [await asyncio.wait_for(reader.read(), 20) for reader, _ in opened]
    for _, writer in opened:
        writer.close()
    server.stop()
    await server.close_all_connections()
    return found


GET = b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"


def test_a_client_beyond_the_limit_is_sent_away_and_the_others_are_answered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bounded_server, "MAX_CONNECTIONS", 2)
    monkeypatch.setattr(bounded_server, "HEADER_SECONDS", 1.0)
    silent, refused_when_full = asyncio.run(answers(None, None, GET + b"\r\n"))[1:]
    assert silent == b"" and refused_when_full == b""
    assert asyncio.run(answers(GET + b"\r\n", GET + b"\r\n", GET + b"\r\n"))[2].endswith(b"hello")


def test_a_client_that_never_ends_its_headers_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_server, "HEADER_SECONDS", 0.3)
    slow, whole = asyncio.run(answers(GET, GET + b"\r\n"))
    assert slow == b"" and whole.endswith(b"hello")


def test_a_connection_lasts_so_long_and_no_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_server, "CONNECTION_SECONDS", 0.3)
    (found,) = asyncio.run(answers(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"))
    assert found.endswith(b"hello"), "answered, and then the idle connection is closed"


@pytest.mark.parametrize(
    "addition", [b"X: " + b"a" * 20_000 + b"\r\n", b"Content-Length: 1000000\r\n"]
)
def test_large_headers_and_bodies_are_refused(addition: bytes) -> None:
    (found,) = asyncio.run(answers(GET + addition + b"\r\n"))
    assert b"hello" not in found

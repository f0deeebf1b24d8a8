"""No client fills the server of `cpt watch`: too many, too slow, too large."""

from __future__ import annotations

import asyncio
import socket

import pytest
import tornado.netutil
import tornado.web

from cpt.telemetry.watch import bounded_server
from cpt.telemetry.watch.bounded_server import BoundedServer, admit_connection


class Greeting(tornado.web.RequestHandler):
    def get(self) -> None:
        self.write("hello")


class Admitting(tornado.web.RequestHandler):
    def get(self) -> None:
        admit_connection(self)
        self.write("hello")


async def answers(*requests: bytes | None) -> list[bytes]:
    """Send each request over a connection of its own, all open together; None sends nothing."""
    server = BoundedServer(tornado.web.Application([("/", Greeting), ("/known", Admitting)]))
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


KNOWN = b"GET /known HTTP/1.1\r\nHost: localhost\r\n\r\n"
"""From who has the token; the connection stays open."""


def test_silent_connections_do_not_keep_a_new_client_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bounded_server, "MAX_CONNECTIONS", 2)
    monkeypatch.setattr(bounded_server, "HEADER_SECONDS", 1.0)
    found = asyncio.run(answers(None, None, None, GET + b"\r\n"))
    assert found[:2] == [b"", b""] and found[3].endswith(b"hello")
    whole = GET + b"\r\n"
    assert asyncio.run(answers(whole, whole, whole))[2].endswith(b"hello")


def test_a_client_with_the_token_is_kept_and_others_are_sent_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(bounded_server, "MAX_CONNECTIONS", 2)
    monkeypatch.setattr(bounded_server, "HEADER_SECONDS", 1.0)
    one, other, new = asyncio.run(answers(KNOWN, KNOWN, GET + b"\r\n"))
    assert one.endswith(b"hello") and other.endswith(b"hello") and new == b""


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

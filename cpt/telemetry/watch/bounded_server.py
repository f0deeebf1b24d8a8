"""An HTTP server that no client can fill: on headers, connections and their time there are limits.

A client that sends its headers slowly is left after `HEADER_SECONDS`, one that reads its answer
slowly after `CONNECTION_SECONDS`; a browser opens a new connection by itself.
"""

from __future__ import annotations

from typing import Any

import tornado.httpserver
import tornado.ioloop
import tornado.iostream
import tornado.web

MAX_CONNECTIONS = 128
"""Connections at the same time; more are closed at once."""
HEADER_BYTES = 16 * 2**10
"""Size of the headers of a request."""
HEADER_SECONDS = 30.0
"""How long a connection may be silent before its headers are there."""
CONNECTION_SECONDS = 600.0
"""How long a connection may last."""


class BoundedServer(tornado.httpserver.HTTPServer):
    """Takes requests without a body."""

    def initialize(self, application: tornado.web.Application) -> None:  # type: ignore[override]
        """Set the limits that tornado knows, for requests to an application."""
        super().initialize(
            application,
            max_header_size=HEADER_BYTES,
            idle_connection_timeout=HEADER_SECONDS,
            max_body_size=0,
        )
        self._ends: dict[tornado.iostream.IOStream, object] = {}
        """What closes each open connection in time."""

    def handle_stream(self, stream: tornado.iostream.IOStream, address: tuple[Any, ...]) -> None:
        """Serve a new connection, or close it if there are too many."""
        if len(self._ends) >= MAX_CONNECTIONS:
            stream.close()
            return
        loop = tornado.ioloop.IOLoop.current()
        self._ends[stream] = loop.call_later(CONNECTION_SECONDS, stream.close)
        super().handle_stream(stream, address)

    def on_close(self, server_conn: object) -> None:
        """Forget a connection that is closed."""
        super().on_close(server_conn)
        end = self._ends.pop(server_conn.stream, None)  # type: ignore[attr-defined]
        if end is not None:
            tornado.ioloop.IOLoop.current().remove_timeout(end)

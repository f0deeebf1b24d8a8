"""An HTTP server that no client can fill: on headers, connections and their time there are limits.

A client that sends its headers slowly is left after `HEADER_SECONDS`, one that reads its answer
slowly after `CONNECTION_SECONDS`; a browser opens a new connection by itself.

Of too many connections the oldest one goes that has not shown yet that it may ask.  Otherwise
another user of the machine could hold all of them, silently, and lock the owner out.
"""

from __future__ import annotations

from typing import Any

import tornado.httpserver
import tornado.ioloop
import tornado.iostream
import tornado.web

MAX_CONNECTIONS = 128
"""Connections at the same time."""
HEADER_BYTES = 16 * 2**10
"""Size of the headers of a request."""
HEADER_SECONDS = 30.0
"""How long a connection may be silent before its headers are there."""
CONNECTION_SECONDS = 600.0
"""How long a connection may last."""
_SERVER = "bounded_server"
"""Setting of an application under which its handlers find the server."""


class BoundedServer(tornado.httpserver.HTTPServer):
    """Takes requests without a body.

    Handlers of its application call `admit_connection` for who may ask.
    """

    def initialize(self, application: tornado.web.Application) -> None:  # type: ignore[override]
        """Set the limits that tornado knows, for requests to an application."""
        super().initialize(
            application,
            max_header_size=HEADER_BYTES,
            idle_connection_timeout=HEADER_SECONDS,
            max_body_size=0,
        )
        application.settings[_SERVER] = self
        self._ends: dict[tornado.iostream.IOStream, object] = {}
        """What closes each open connection in time."""
        self._strangers: dict[tornado.iostream.IOStream, None] = {}
        """Open connections that have not shown that they may ask, oldest first."""

    def handle_stream(self, stream: tornado.iostream.IOStream, address: tuple[Any, ...]) -> None:
        """Serve a new connection; if there are too many, close one in its place, or it."""
        if len(self._ends) >= MAX_CONNECTIONS:
            if not self._strangers:
                stream.close()
                return
            oldest = next(iter(self._strangers))
            self._forget(oldest)
            oldest.close()
        loop = tornado.ioloop.IOLoop.current()
        self._ends[stream] = loop.call_later(CONNECTION_SECONDS, stream.close)
        self._strangers[stream] = None
        super().handle_stream(stream, address)

    def admit(self, stream: tornado.iostream.IOStream) -> None:
        """Keep a connection, whoever else connects."""
        self._strangers.pop(stream, None)

    def on_close(self, server_conn: object) -> None:
        """Forget a connection that is closed."""
        super().on_close(server_conn)
        self._forget(server_conn.stream)  # type: ignore[attr-defined]

    def _forget(self, stream: tornado.iostream.IOStream) -> None:
        self._strangers.pop(stream, None)
        end = self._ends.pop(stream, None)
        if end is not None:
            tornado.ioloop.IOLoop.current().remove_timeout(end)


def admit_connection(handler: tornado.web.RequestHandler) -> None:
    """Keep the connection of a request that may be asked, whoever else connects."""
    stream = handler.request.connection.stream  # type: ignore[union-attr]
    handler.application.settings[_SERVER].admit(stream)

"""The web server of `cpt watch`: one process that only reads.

    /                   all runs            /rows           its rows alone
    /run/KEY            one run             /report/KEY     its report, drawn when it is asked for
    /compare?run=KEY..  runs laid over each other
    /version?run=KEY..  a text that changes when the report, or with axis= the comparison, would
    /api/runs           the same as JSON    /api/run/KEY

Decisions
    Only GET and HEAD are answered.
    An address names a run that was found below the folder (`Board.find`), or nothing.
    A server on the loopback device answers only requests that were sent to it by such a name, so
    that no foreign web page can read it through a name of its own (DNS rebinding).
    The loopback device is not private: all users of a login node share it. So only who knows the
    token of this start is answered, as with Jupyter. The address that is printed has it; a
    browser that opens it gets a cookie and is sent on to the address without it.
    Looking and drawing happen in a thread, one at a time, and only when somebody asks; what was
    seen less than `interval` seconds ago is shown again.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import secrets
import signal
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlencode

import tornado.netutil
import tornado.web

from cpt.errors import ConfigError
from cpt.telemetry.report.comparison import AXES, Axis
from cpt.telemetry.watch.board import Board, ListedRun
from cpt.telemetry.watch.bounded_server import BoundedServer, admit_connection
from cpt.telemetry.watch.pages import Pages, static_file

log = logging.getLogger("cpt.watch")

LOOPBACK = ("127.0.0.1", "::1", "localhost")
OWN_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "frame-src 'self'; img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
)
CHART_POLICY = (
    "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'self'"
)
"""Of a report: it holds its own scripts, and may fetch nothing."""
MAX_COMPARED = 8
MAX_KEPT_PAGES = 16
REST_RATIO = 5.0
"""A page that took a second to draw is drawn again after so many seconds at the earliest."""


@dataclass(kw_only=True, slots=True)
class _DrawnPage:
    """A page with charts, which are dear to draw."""

    version: str
    text: str
    good_until: float
    """Time of the monotonic clock until which it is shown even if the run has gone on."""


@dataclass(kw_only=True)
class Watch:
    """What all requests share."""

    board: Board
    pages: Pages
    interval_seconds: float
    """How old a look at the runs may be, and how often pages ask."""
    hosts: tuple[str, ...]
    """Names by which requests must be addressed; empty for any."""
    token: str
    """What requests must know; empty for nothing."""
    cookie: str
    """Name of the cookie with the token; servers on other ports of a host share its cookies."""
    _looked: float = -1e9
    _drawn: dict[str, _DrawnPage] = field(default_factory=dict)
    _thread: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(1))
    _turn: asyncio.Lock = field(default_factory=asyncio.Lock)

    async def look(self) -> None:
        """Look at all runs, unless that was done a moment ago."""
        async with self._turn:
            if time.monotonic() - self._looked >= self.interval_seconds:
                await self._in_thread(self.board.refresh)
                self._looked = time.monotonic()

    def version_of(self, name: str, runs: Sequence[ListedRun]) -> str:
        """Return the version that a page would be shown in now.

        Args:
            name: Name of the page.
            runs: The runs that it shows.
        """
        kept = self._drawn.get(name)
        if kept is not None and time.monotonic() < kept.good_until:
            return kept.version
        return version_of(runs)

    async def draw(self, name: str, version: str, draw: Callable[[], str]) -> str:
        """Return a page, drawn anew if what it shows has changed.

        Args:
            name: Name of the page.
            version: A text that changes with what it shows.
            draw: Draws it.
        """
        async with self._turn:
            kept = self._drawn.get(name)
            began = time.monotonic()
            if kept is not None and (kept.version == version or began < kept.good_until):
                return kept.text
            text = await self._in_thread(draw)
            ended = time.monotonic()
            good_until = ended + REST_RATIO * (ended - began)
            while len(self._drawn) >= MAX_KEPT_PAGES:
                del self._drawn[next(iter(self._drawn))]
            self._drawn[name] = _DrawnPage(version=version, text=text, good_until=good_until)
            return text

    async def _in_thread(self, action: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, action)


class _Handler(tornado.web.RequestHandler):
    """One address; subclasses answer GET."""

    watch: Watch
    policy = OWN_POLICY

    def initialize(self, watch: Watch) -> None:
        self.watch = watch

    def set_default_headers(self) -> None:
        self.set_header("Server", "cpt watch")
        self.set_header("Content-Security-Policy", self.policy)
        self.set_header("X-Content-Type-Options", "nosniff")
        self.set_header("Referrer-Policy", "no-referrer")
        self.set_header("Cache-Control", "no-store")

    async def prepare(self) -> None:
        hosts = self.watch.hosts
        if hosts and self.request.host_name.strip("[]") not in hosts:
            raise tornado.web.HTTPError(403, reason="Ask for localhost")
        if not self._admit():
            return
        if self.request.method in ("GET", "HEAD"):
            await self.watch.look()

    def _admit(self) -> bool:
        """Refuse who does not know the token.

        A browser that opens the address with the token is given the cookie and sent on to the
        address without it.

        Returns:
            Whether an answer is still to be given.

        Raises:
            HTTPError: the token is missing or wrong.
        """
        token = self.watch.token
        if not token or _is_same(self.get_cookie(self.watch.cookie) or "", token):
            admit_connection(self)
            return True
        asked = self.get_query_argument("token", "")
        if not _is_same(asked, token):
            raise tornado.web.HTTPError(403, reason="Open the address that cpt watch has printed")
        admit_connection(self)
        if self.request.path.startswith("/api/"):
            return True
        self.set_cookie(self.watch.cookie, token, httponly=True, samesite="Lax", path="/")
        others = [pair for pair in parse_qsl(self.request.query) if pair[0] != "token"]
        query = f"?{urlencode(others)}" if others else ""
        self.redirect(f"{self.request.path}{query}", status=303)
        return False

    async def head(self, *path: str) -> None:
        answer = self.get(*path)
        if answer is not None:
            await answer

    def write_error(self, status_code: int, **_: Any) -> None:
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        self.finish(f"{status_code}: {self._reason}\n")

    def run_of(self, key: str) -> ListedRun:
        """Return the run of an address.

        Raises:
            HTTPError: there is none.
        """
        found = self.watch.board.find(key)
        if found is None:
            raise tornado.web.HTTPError(404, reason="No such run")
        return found

    def asked_runs(self) -> list[ListedRun]:
        """Return the runs that the query names.

        Raises:
            HTTPError: one of them does not exist, or they are none or too many.
        """
        keys = list(dict.fromkeys(self.get_query_arguments("run")))
        if not 1 <= len(keys) <= MAX_COMPARED:
            raise tornado.web.HTTPError(400, reason=f"Name 1 to {MAX_COMPARED} runs")
        return [self.run_of(key) for key in keys]

    def asked_axis(self) -> Axis:
        """Return the horizontal axis that the query asks for.

        Raises:
            HTTPError: there is no such axis.
        """
        asked = self.get_query_argument("axis", AXES[0])
        for axis in AXES:
            if axis == asked:
                return axis
        raise tornado.web.HTTPError(400, reason="The axis is steps or tokens")

    def write_json(self, content: Any) -> None:
        """Answer with JSON."""
        self.set_header("Content-Type", "application/json; charset=utf-8")
        self.write(json.dumps(content, allow_nan=False))


class _Index(_Handler):
    async def get(self) -> None:
        self.write(self.watch.pages.index(self.watch.board, self.watch.interval_seconds))


class _RowsAlone(_Handler):
    async def get(self) -> None:
        self.write(self.watch.pages.rows(self.watch.board))


class _RunPage(_Handler):
    async def get(self, key: str) -> None:
        run = self.run_of(key)
        version = self.watch.version_of(page_name([run]), [run])
        self.write(self.watch.pages.run(run, version, self.watch.interval_seconds))


class _Report(_Handler):
    policy = CHART_POLICY

    async def get(self, key: str) -> None:
        run = self.run_of(key)
        name = page_name([run])
        pages = self.watch.pages
        self.write(await self.watch.draw(name, version_of([run]), lambda: pages.report(run)))


class _ComparePage(_Handler):
    async def get(self) -> None:
        runs = self.asked_runs()
        axis = self.asked_axis()
        version = self.watch.version_of(page_name(runs, axis), runs)
        interval = self.watch.interval_seconds
        self.write(self.watch.pages.comparing(runs, axis, version, interval))


class _Comparison(_Handler):
    policy = CHART_POLICY

    async def get(self) -> None:
        runs = self.asked_runs()
        axis = self.asked_axis()
        name = page_name(runs, axis)
        pages = self.watch.pages
        text = await self.watch.draw(name, version_of(runs), lambda: pages.comparison(runs, axis))
        self.write(text)


class _Version(_Handler):
    async def get(self) -> None:
        self.set_header("Content-Type", "text/plain; charset=utf-8")
        runs = self.asked_runs()
        axis = self.asked_axis() if self.get_query_arguments("axis") else ""
        self.write(self.watch.version_of(page_name(runs, axis), runs))


class _ApiRuns(_Handler):
    async def get(self) -> None:
        runs = {run.key: run.overview.to_json() for run in self.watch.board.runs()}
        self.write_json(runs)


class _ApiRun(_Handler):
    async def get(self, key: str) -> None:
        self.write_json(self.run_of(key).overview.to_json())


class _Static(_Handler):
    """A style sheet or a script of this package."""

    async def get(self, name: str) -> None:
        content_type, text = static_file(name)
        self.set_header("Content-Type", f"{content_type}; charset=utf-8")
        self.write(text)


class _Nothing(_Handler):
    async def prepare(self) -> None:
        raise tornado.web.HTTPError(404, reason="No such page")


def page_name(runs: Sequence[ListedRun], axis: str = "") -> str:
    """Return the name of a page with charts: of a report, or of a comparison over an axis."""
    return f"{axis} {[run.key for run in runs]}"


def version_of(runs: Sequence[ListedRun]) -> str:
    """Return a text that changes when one of the runs has changed."""
    parts = []
    for run in runs:
        seen = run.overview
        parts.append(f"{seen.state} {seen.step} {seen.saved_step} {len(seen.actions)} {seen.loss}")
    return "; ".join(parts)


def application(watch: Watch) -> tornado.web.Application:
    """Return the application that answers all addresses."""
    shared = {"watch": watch}
    return tornado.web.Application(
        [
            (r"/", _Index, shared),
            (r"/rows", _RowsAlone, shared),
            (r"/run/(.+)", _RunPage, shared),
            (r"/report/(.+)", _Report, shared),
            (r"/compare", _ComparePage, shared),
            (r"/comparison", _Comparison, shared),
            (r"/version", _Version, shared),
            (r"/api/runs", _ApiRuns, shared),
            (r"/api/run/(.+)", _ApiRun, shared),
            (r"/static/(watch\.css|watch\.js)", _Static, shared),
        ],
        default_handler_class=_Nothing,
        default_handler_args=shared,
        compress_response=True,
        log_function=_log_request,
    )


def _log_request(handler: tornado.web.RequestHandler) -> None:
    milliseconds = 1000 * handler.request.request_time()
    # the query of an address may hold the token
    log.debug("%d %s %.0f ms", handler.get_status(), handler.request.path, milliseconds)


def _is_same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(errors="replace"), token.encode())


def serve(
    root: Path,
    *,
    host: str,
    port: int,
    depth: int,
    interval_seconds: float,
    needs_token: bool,
    told: Callable[[str], None],
) -> None:
    """Serve until the process is interrupted or terminated.

    Args:
        root: Folder of the runs.
        host: Address to listen on.
        port: Port; 0 takes a free one.
        depth: Levels of folders below the root that may be run directories.
        interval_seconds: How often pages ask for news.
        needs_token: Answer only to who knows the token of the address that is told.
        told: Is given the address once the server answers.

    Raises:
        ConfigError: the folder does not exist, or the address cannot be listened on.
    """
    if not root.is_dir():
        raise ConfigError(f"--root {root} is no directory. Give the folder that holds the runs.")
    try:
        sockets = tornado.netutil.bind_sockets(port, host)
    except OSError as error:
        raise ConfigError(
            f"{host}:{port} cannot be listened on: {error.strerror}. Give another --port "
            "(0 takes a free one) or --host."
        ) from error
    taken = sockets[0].getsockname()[1]
    token = secrets.token_urlsafe(24) if needs_token else ""

    async def run() -> None:
        watch = Watch(
            board=Board(root, depth=depth),
            pages=Pages(),
            interval_seconds=interval_seconds,
            hosts=LOOPBACK if host in LOOPBACK else (),
            token=token,
            cookie=f"cpt-watch-{taken}",
        )
        server = BoundedServer(application(watch))
        server.add_sockets(sockets)
        named = f"[{host}]" if ":" in host else host
        told(f"http://{named}:{taken}/{f'?token={token}' if token else ''}")
        asked_to_end = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, asked_to_end.set)
        await asked_to_end.wait()
        server.stop()

    asyncio.run(run())

"""A local server that speaks as much of S3 as reading takes: list, look at, read a range.

It takes any signature and looks at none, but notes whether a request had one.
"""

from __future__ import annotations

import contextlib
import email.utils
import hashlib
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

import pytest

ACCESS_KEY = "AKIATESTTESTTEST"
SECRET_KEY = "a-secret-that-no-message-may-show"
_PAGE_KEYS = 3
"""Keys on a page of a list: few, so that lists have several pages."""


@dataclass
class Request:
    """One request that the server answered."""

    method: str
    path: str
    range: str
    is_signed: bool


@dataclass
class FakeS3:
    """Buckets, and what the server does about requests."""

    url: str = ""
    buckets: dict[str, dict[str, bytes]] = field(default_factory=dict)
    modified: dict[str, float] = field(default_factory=dict)
    """Seconds since the epoch by `bucket/key`."""
    requests: list[Request] = field(default_factory=list)
    refusal: tuple[int, str] | None = None
    """Status and code of the error that answers every request."""
    before_read: Callable[[str], None] | None = None
    """Called with `bucket/key` before a piece of an object is sent."""

    def put(self, bucket: str, key: str, content: bytes, modified: float = 1.7e9) -> None:
        """Write an object."""
        self.buckets.setdefault(bucket, {})[key] = content
        self.modified[f"{bucket}/{key}"] = modified

    def size_of(self, key: str) -> int:
        """Return the bytes of an object of the bucket `corpus`."""
        return len(self.buckets["corpus"][key])

    def reads(self) -> list[Request]:
        """Return the requests for pieces of objects."""
        return [request for request in self.requests if request.range]


@contextlib.contextmanager
def fake_s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeS3]:
    """Run a server on a free port, and point the environment to it."""
    store = FakeS3()

    class Handler(_Handler):
        s3 = store

    server = _Server(("127.0.0.1", 0), Handler)
    store.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("AWS_ENDPOINT_URL", store.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_REGION", "AWS_DEFAULT_REGION"):
        monkeypatch.delenv(name, raising=False)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):  # a client that gave up
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    s3: FakeS3
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        del format, args

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        parts = urlsplit(self.path)
        bucket, _, key = unquote(parts.path).lstrip("/").partition("/")
        asked = self.headers.get("Range", "")
        signed = "Authorization" in self.headers
        self.s3.requests.append(Request(self.command, f"{bucket}/{key}", asked, signed))
        if asked and self.s3.before_read is not None:
            self.s3.before_read(f"{bucket}/{key}")
        if self.s3.refusal is not None:
            self._error(*self.s3.refusal)
        elif bucket not in self.s3.buckets:
            self._error(404, "NoSuchBucket")
        elif key:
            self._object(bucket, key, asked)
        elif self.command == "HEAD":
            self._send(200, b"")
        else:
            self._list(bucket, parse_qs(parts.query))

    def _object(self, bucket: str, key: str, asked: str) -> None:
        content = self.s3.buckets[bucket].get(key)
        if content is None:
            self._error(404, "NoSuchKey")
            return
        when = self.s3.modified[f"{bucket}/{key}"]
        headers = {
            "ETag": f'"{hashlib.md5(content).hexdigest()}"',
            "Last-Modified": email.utils.formatdate(when, usegmt=True),
            "Accept-Ranges": "bytes",
        }
        if not asked:
            self._send(200, content, headers)
            return
        first, last = asked.removeprefix("bytes=").split("-")
        piece = content[int(first) : int(last) + 1]
        end = int(first) + len(piece) - 1
        headers["Content-Range"] = f"bytes {first}-{end}/{len(content)}"
        self._send(206, piece, headers)

    def _list(self, bucket: str, query: dict[str, list[str]]) -> None:
        prefix = query.get("prefix", [""])[0]
        delimiter = query.get("delimiter", [""])[0]
        after = query.get("continuation-token", [""])[0]
        entries: dict[str, str] = {}
        for key in sorted(self.s3.buckets[bucket]):
            if not key.startswith(prefix):
                continue
            rest = key[len(prefix) :]
            if delimiter and delimiter in rest:
                folder = prefix + rest.partition(delimiter)[0] + delimiter
                shown = f"<CommonPrefixes><Prefix>{escape(folder)}</Prefix></CommonPrefixes>"
                entries[folder] = shown
            else:
                entries[key] = self._entry(bucket, key)
        names = [name for name in sorted(entries) if name > after]
        page = names[:_PAGE_KEYS]
        more = len(names) > len(page)
        token = f"<NextContinuationToken>{escape(page[-1])}</NextContinuationToken>" if more else ""
        body = (
            '<?xml version="1.0" encoding="UTF-8"?>'
            '<ListBucketResult xmlns="http://s3.amazonaws.com/doc/2006-03-01/">'
            f"<Name>{bucket}</Name><Prefix>{escape(prefix)}</Prefix>"
            f"<KeyCount>{len(page)}</KeyCount><MaxKeys>{_PAGE_KEYS}</MaxKeys>"
            f"<IsTruncated>{str(more).lower()}</IsTruncated>{token}"
            f"{''.join(entries[name] for name in page)}</ListBucketResult>"
        )
        self._send(200, body.encode(), {"Content-Type": "application/xml"})

    def _entry(self, bucket: str, key: str) -> str:
        content = self.s3.buckets[bucket][key]
        when = datetime.fromtimestamp(self.s3.modified[f"{bucket}/{key}"], UTC)
        stamp = when.strftime("%Y-%m-%dT%H:%M:%S.000Z")
        etag = hashlib.md5(content).hexdigest()
        return (
            f"<Contents><Key>{escape(key)}</Key><LastModified>{stamp}</LastModified>"
            f"<ETag>&quot;{etag}&quot;</ETag><Size>{len(content)}</Size>"
            "<StorageClass>STANDARD</StorageClass></Contents>"
        )

    def _error(self, status: int, code: str) -> None:
        # what a hostile or chatty server could say
        body = f"<Error><Code>{code}</Code><Message>your key {ACCESS_KEY}</Message></Error>"
        self._send(status, body.encode(), {"Content-Type": "application/xml"})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

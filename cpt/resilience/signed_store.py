"""Records in the store of the process group that only the ranks of this job can have written.

Everybody who reaches the port of torch's store can set, replace and remove any key of it. So each
record carries a signature, and a reader takes for absent whatever does not verify.

    value = HMAC-SHA256(key, length of name | name | body), 64 hexadecimal digits | body
    body  = {"number": ..., "record": ...} as JSON

Decisions
    The key is that of one start of one job (cpt.resilience.job_secret), so a record of an earlier
    start does not verify. The name is signed, so a record cannot be moved to another name. The
    number of a name only rises, so an older record of the same name is not taken for a newer one.
    A body is parsed only after its signature was found to be right.
    torch offers no bounded read. Its server refuses a `set` of more than 8 MiB, but a value can be
    made longer by `append`. A value that is longer than any record is removed, so that it is read
    once.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import secrets
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

MAX_RECORD_BYTES = 256 * 1024
"""No record is longer: a text of 4,000 characters, and the numbers of 10,000 ranks."""
SETTLE_TRIES = 3
"""How often a record that shall be the first one is offered, if somebody writes in between."""
_SIGNATURE_LENGTH = 64


class SignedStore:
    """A store whose records are signed; what is not signed by this job is not there."""

    def __init__(
        self, store: dist.Store, key: bytes, on_foreign: Callable[[str, str], None]
    ) -> None:
        """Wrap a store.

        Args:
            store: The store, which others may write to.
            key: The key of this start.
            on_foreign: Is told the name and what is wrong with each record that is not taken.
        """
        self._store = store
        self._key = key
        self._on_foreign = on_foreign
        self._num_written = 0
        self._last_numbers: dict[str, int] = {}
        self._told: dict[str, int] = {}
        # what `_value` gets for a key that is absent; nobody can store it, since nobody knows it
        self._absent = secrets.token_hex(16)

    def write(self, name: str, record: dict[str, Any]) -> None:
        """Store a record under a name that only this rank writes, whatever is there."""
        self._num_written += 1
        self._store.set(name, self._sign(name, self._num_written, record))

    def read(self, name: str) -> dict[str, Any] | None:
        """Return the record of a name; None if there is none that this job wrote. Never waits."""
        return self._open(name, self._value(name))

    def read_all(self, names: Sequence[str]) -> list[dict[str, Any] | None]:
        """Return the record of each name, or None; two requests if all names exist."""
        if self._store.check(list(names)):
            # a name that somebody removes in between makes the store wait until its timeout
            with contextlib.suppress(dist.DistStoreError):
                values = self._store.multi_get(list(names))
                return [self._open(name, value) for name, value in zip(names, values, strict=True)]
        return [self.read(name) for name in names]

    def settle(self, name: str, record: dict[str, Any]) -> dict[str, Any]:
        """Store a record unless some rank has stored one; return the one that holds.

        What this job did not write is replaced.
        """
        own = self._sign(name, 0, record)
        for _ in range(SETTLE_TRIES):
            value = self._value(name)
            found = self._open(name, value)
            if found is not None:
                return found
            if value is None or len(value) > MAX_RECORD_BYTES:
                value = b""  # the store takes this for "absent"
            # what others wrote need not be text; pybind takes bytes where the stub says str
            stored = self._store.compare_set(name, value, own)  # type: ignore[arg-type]
            if stored == own.encode():
                return record
        self._store.set(name, own)
        return record

    def _value(self, name: str) -> bytes | None:
        """Return what is stored under a name, without waiting for it.

        `get` would wait for an absent key. `compare_set` returns what is there, or what it was told
        to expect if there is nothing.
        """
        value = self._store.compare_set(name, self._absent, self._absent)
        return None if value == self._absent.encode() else value

    def _sign(self, name: str, number: int, record: dict[str, Any]) -> str:
        body = json.dumps({"number": number, "record": record})
        return self._signature(name, body.encode()) + body

    def _signature(self, name: str, body: bytes) -> str:
        named = name.encode()
        message = len(named).to_bytes(4, "big") + named + body
        return hmac.new(self._key, message, hashlib.sha256).hexdigest()

    def _open(self, name: str, value: bytes | None) -> dict[str, Any] | None:
        """Return the record of a value; None if there is none, or if it is not one of this job."""
        if value is None:
            if name in self._last_numbers:
                self._tell(name, b"", "it was removed")
            return None
        if len(value) > MAX_RECORD_BYTES:
            self._tell(name, value, f"it has {len(value)} bytes")
            self._store.delete_key(name)
            return None
        signature = value[:_SIGNATURE_LENGTH]
        body = value[_SIGNATURE_LENGTH:]
        if not hmac.compare_digest(signature, self._signature(name, body).encode()):
            self._tell(name, value, "its signature is wrong")
            return None
        signed = json.loads(body)
        if signed["number"] < self._last_numbers.get(name, 0):
            self._tell(name, value, "it is an old record")
            return None
        self._last_numbers[name] = signed["number"]
        self._told.pop(name, None)
        return signed["record"]

    def _tell(self, name: str, value: bytes, why: str) -> None:
        """Tell of a record that is not taken, unless the same one was told at the last look."""
        seen = hash(value)
        if self._told.get(name) != seen:
            self._told[name] = seen
            self._on_foreign(name, why)

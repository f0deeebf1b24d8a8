"""Bytes on the wire, counted by the code that sends them."""

from __future__ import annotations

from typing import Literal

Kind = Literal["ulysses", "halo", "experts"]
KINDS: tuple[Kind, ...] = ("ulysses", "halo", "experts")


class Traffic:
    """Bytes that this rank has sent to other ranks, by kind, since the last `take`."""

    def __init__(self) -> None:
        self._bytes: dict[Kind, int] = dict.fromkeys(KINDS, 0)

    def add(self, kind: Kind, num_bytes: int) -> None:
        """Count bytes that leave for another rank."""
        self._bytes[kind] += num_bytes

    def take(self) -> dict[Kind, int]:
        """Return the counters and set them to zero."""
        taken = self._bytes
        self._bytes = dict.fromkeys(KINDS, 0)
        return taken

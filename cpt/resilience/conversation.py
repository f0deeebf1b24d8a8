"""The conversation of the ranks through the store: signs of life, the ruling, and farewells.

    beat/RANK   where a rank is, written by that rank at every look
    verdict     the ruling; the first one holds
    left/RANK   the rank knows the ruling and is about to leave

All of them are signed (cpt.resilience.signed_store). A record that cannot be used counts as absent
and is told to `on_foreign`.
"""

from __future__ import annotations

import hashlib
import hmac
import os
from collections.abc import Callable, Iterable
from datetime import timedelta

import torch.distributed as dist

from cpt.resilience.heartbeat import Beat
from cpt.resilience.ruling import Ruling
from cpt.resilience.signed_store import SignedStore

PREFIX = "cpt/watchdog"
"""Where the keys of all starts are."""
RULING = "verdict"
"""Key of the ruling in the store."""
CONNECT_SECONDS = 60
ANSWER_SECONDS = 1
"""How long the store waits for a key that was there a moment ago."""


def connect(key: bytes) -> dist.Store:
    """Return a connection of its own to the part of the group's store that is this start's.

    torchrun keeps one store for several starts, so each has a prefix of its own, made from its key.

    Raises:
        DistNetworkError: the store does not answer.
    """
    client = dist.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        wait_for_workers=False,
        timeout=timedelta(seconds=CONNECT_SECONDS),
    )
    client.set_timeout(timedelta(seconds=ANSWER_SECONDS))
    place = hmac.new(key, b"prefix", hashlib.sha256).hexdigest()[:16]
    return dist.PrefixStore(f"{PREFIX}/{place}", client)


class RankConversation:
    """What one rank says to the others, and hears from them."""

    def __init__(
        self,
        rank: int,
        world_size: int,
        store: SignedStore,
        on_foreign: Callable[[str, str], None],
    ) -> None:
        """Begin a conversation.

        Args:
            rank: This rank.
            world_size: Number of ranks.
            store: Where the records are.
            on_foreign: Is told the name and what is wrong with each record that is not taken.
        """
        self._rank = rank
        self._world_size = world_size
        self._store = store
        self._on_foreign = on_foreign
        self._beats: dict[int, Beat] = {}

    def publish(self, beat: Beat) -> None:
        """Say where this rank is."""
        self._beats[self._rank] = beat
        self._store.write(f"beat/{self._rank}", beat.to_record())

    def beat_of(self, rank: int) -> Beat | None:
        """Return the newest sign of life of a rank; None if it has given none yet."""
        self._take_beat(rank, self._store.read(f"beat/{rank}"))
        return self._beats.get(rank)

    def beats(self) -> list[Beat] | None:
        """Return the newest beat of every rank, by rank; None until each has given one.

        This rank's own is the one that it has published, whatever the store says.
        """
        names = [f"beat/{rank}" for rank in range(self._world_size)]
        for rank, record in enumerate(self._store.read_all(names)):
            self._take_beat(rank, record)
        if len(self._beats) < self._world_size:
            return None
        return [self._beats[rank] for rank in range(self._world_size)]

    def _take_beat(self, rank: int, record: object) -> None:
        if record is None or rank == self._rank:
            return
        try:
            self._beats[rank] = Beat.from_record(record)
        except ValueError as error:
            self._on_foreign(f"beat/{rank}", str(error))

    def ruling(self) -> Ruling | None:
        """Return the ruling; None if there is none."""
        return self._ruling_of(self._store.read(RULING))

    def settle(self, ruling: Ruling) -> Ruling:
        """Make a ruling that of all ranks unless there is one; return the one that holds."""
        found = self._store.settle(RULING, ruling.to_record())
        return self._ruling_of(found) or ruling

    def _ruling_of(self, record: object) -> Ruling | None:
        if record is None:
            return None
        try:
            return Ruling.from_record(record, self._world_size)
        except ValueError as error:
            self._on_foreign(RULING, str(error))
            return None

    def say_farewell(self) -> None:
        """Say that this rank is about to leave."""
        self._store.write(f"left/{self._rank}", {})

    def have_left(self, ranks: Iterable[int]) -> bool:
        """Return whether all these ranks are about to leave."""
        names = [f"left/{rank}" for rank in ranks]
        return all(record is not None for record in self._store.read_all(names))

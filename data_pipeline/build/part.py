"""One unit of a source -> one token shard, with all that the end of the build needs to know about
its documents.

    texts of a unit -> content hashes -> seen in this unit? -> tokens -> shard
                                                                 |
                                                                 +-> MinHash signatures

Decisions
    A part is complete if and only if its account (JSON) is there: it is written last.  A rerun
    makes what is missing. Nothing here depends on other units, so parts may be made in any order,
    by any number of processes or machines.
"""

from __future__ import annotations

import array
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import xxhash

from data_pipeline.build.deduplication import Hashes, as_array, content_hash
from data_pipeline.build.near_duplicates import NUM_HASHES, Signatures, signatures
from data_pipeline.build.sources import invent_documents, read_documents
from data_pipeline.build.units import MOCK_BYTES_PER_TOKEN, Unit
from data_pipeline.config.source_config import SourceConfig
from data_pipeline.store.files import atomic_write, sha256_of, write_json
from data_pipeline.store.shards import SUFFIX, writing
from data_pipeline.text.cleaning import Tally
from data_pipeline.text.harmony import Conversation, body
from data_pipeline.text.tokenizer import Tokens, encode

MAX_SEEN = 1 << 20
"""Content hashes kept to find copies within a unit; those further apart are found at the end of the
build.
"""
SIGNATURE_TOKENS = 1 << 17
"""Tokens whose signatures are computed at once."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Part:
    """Where one part of a build lies, and what it is made of."""

    source: SourceConfig
    unit: Unit
    number: int
    """Of the unit within its source."""
    work_dir: Path
    """Holds `build`, which becomes the build, and `parts`, the accounts."""
    near_duplicates: bool
    """Whether signatures are needed."""

    @property
    def shard_path(self) -> Path:
        """Its token shard; absent if the unit has no document."""
        return self.work_dir / "build" / self.source.name / f"documents-{self.number:05d}{SUFFIX}"

    def side_path(self, kind: str) -> Path:
        """`json` (the account), `hashes` or `minhash`."""
        return self.work_dir / "parts" / self.source.name / f"{self.number:05d}.{kind}"


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Account:
    """What became of one unit."""

    tally: Tally
    num_documents: int
    """Documents in the shard, each text once."""
    num_tokens: int
    """Tokens of those, END_OF_TEXT included."""
    num_duplicates: int
    """Documents left out because the unit has the same text before."""
    shard_bytes: int
    """Size of the shard; 0 if there is none."""
    shard_sha256: str
    """Hex digest of the shard."""


def read_account(part: Part) -> Account | None:
    """The account of a part that is complete; None if it is still to be made."""
    try:
        value = json.loads(part.side_path("json").read_bytes())
        if value["num_documents"] and part.shard_path.stat().st_size != value["shard_bytes"]:
            return None
    except (OSError, ValueError):
        return None
    return Account(**{**value, "tally": Tally.from_json(value["tally"])})


def read_hashes(part: Part) -> Hashes:
    """Content hashes of the documents in a part's shard, as a memory map."""
    return np.asarray(np.load(part.side_path("hashes"), mmap_mode="r"))


def read_signatures(part: Part) -> Signatures:
    """MinHash signatures of the documents in a part's shard, as a memory map."""
    return np.asarray(np.load(part.side_path("minhash"), mmap_mode="r"))


def make_part(part: Part) -> Account:
    """Read, clean, hash and tokenise one unit.

    Raises:
        DataError: input that cannot be used.
    """
    for path in (part.shard_path, part.side_path("json")):
        path.parent.mkdir(parents=True, exist_ok=True)
    tally, maker = Tally(), _Maker(part)
    documents = maker.documents(tally)
    first = next(documents, None)
    if first is not None:
        with writing(part.shard_path) as shard:
            shard.add(*first)
            for document in documents:
                shard.add(*document)
    with atomic_write(part.side_path("hashes")) as file:
        np.save(file, as_array(maker.keys()))
    if part.near_duplicates:
        with atomic_write(part.side_path("minhash")) as file:
            np.save(file, maker.signatures())
    account = Account(
        tally=tally,
        num_documents=len(maker.high),
        num_tokens=maker.num_tokens,
        num_duplicates=maker.num_duplicates,
        shard_bytes=part.shard_path.stat().st_size if first is not None else 0,
        shard_sha256=sha256_of(part.shard_path) if first is not None else "",
    )
    value: dict[str, Any] = {
        field.name: getattr(account, field.name) for field in dataclasses.fields(account)
    }
    value["tally"] = tally.to_json()
    write_json(part.side_path("json"), value)
    return account


class _Maker:
    """Documents of one unit, and what is gathered about them on the way."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._waiting: list[Tokens] = []
        self._waiting_tokens = 0
        self._signatures: list[Signatures] = []
        self.high, self.low = array.array("Q"), array.array("Q")
        self.num_tokens = 0
        self.num_duplicates = 0

    def documents(self, tally: Tally) -> Iterator[tuple[Tokens, int, bool]]:
        """(tokens, UTF-8 bytes, whether it is a conversation) of each document of the unit once."""
        chat = self._part.source.format == "harmony"
        seen: set[int] = set()
        for key, content in self._contents(tally):
            if key in seen:
                self.num_duplicates += 1
                continue
            if len(seen) >= MAX_SEEN:
                seen.clear()
            seen.add(key)
            if isinstance(content, Conversation):
                tokens, num_bytes = content.tokens(), content.num_bytes
            elif isinstance(content, tuple):
                text, num_bytes = content
                tokens = encode(text)
            else:
                tokens, num_bytes = content, len(content) * MOCK_BYTES_PER_TOKEN
            self._note(key, tokens, chat)
            yield tokens, num_bytes, chat

    def keys(self) -> list[int]:
        """Content hashes."""
        return [high << 64 | low for high, low in zip(self.high, self.low, strict=True)]

    def signatures(self) -> Signatures:
        """MinHash signatures."""
        self._sign()
        return np.concatenate([np.zeros((0, NUM_HASHES), np.uint32), *self._signatures])

    def _contents(
        self, tally: Tally
    ) -> Iterator[tuple[int, tuple[str, int] | Conversation | Tokens]]:
        """(content hash, (text, bytes), conversation or invented tokens)."""
        source, unit = self._part.source, self._part.unit
        if source.format == "mock":
            key = xxhash.xxh3_64_intdigest(source.name.encode())
            for tokens in invent_documents(source, key, unit.start, unit.stop):
                tally.accepted += 1
                yield content_hash(tokens.tobytes()), tokens
            return
        for document in read_documents(source, unit, tally):
            if isinstance(document, Conversation):
                yield content_hash(repr(document.messages).encode("utf-8")), document
                continue
            content = document.encode("utf-8")
            yield content_hash(content), (document, len(content))

    def _note(self, key: int, tokens: Tokens, chat: bool) -> None:
        self.high.append(key >> 64)
        self.low.append(key & 2**64 - 1)
        self.num_tokens += len(tokens) + (not chat)
        if self._part.near_duplicates:
            self._waiting.append(body(tokens) if chat else tokens)
            self._waiting_tokens += len(tokens)
            if self._waiting_tokens >= SIGNATURE_TOKENS:
                self._sign()

    def _sign(self) -> None:
        self._signatures.append(signatures(self._waiting))
        self._waiting, self._waiting_tokens = [], 0

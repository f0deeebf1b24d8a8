"""Consecutive parts of a mix that one task of the last stage reads.

Documents are numbered through all parts of all sources, in the order of the mix, from 0.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.parts.near_duplicates import Signatures
from data_pipeline.parts.part import read_side_file
from data_pipeline.parts.salted_digests import salted_digests
from data_pipeline.parts.source_parts import SourceParts
from data_pipeline.reading.content_hashes import Hashes
from data_pipeline.store.hashing import Hashes64

MAX_DOCUMENTS = 2**32
"""Documents of a mix: their numbers are stored in 32 bits."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NumberedPart:
    """Files of a part that tasks read, and which documents of the mix it holds."""

    hashes_path: Path
    signatures_path: Path
    work_dir: Path
    """Folder of the build in progress."""
    source: int
    """Position of its source in the mix."""
    first: int
    """Number of its first document."""
    stop: int
    """One past the number of its last document."""
    records_path: Path | None = None
    """Content hashes of whole records, whose documents are all held out, or none; None if the hash
    of a document is that of its record."""
    bodies_path: Path | None = None
    """Hashes by which copies of conversations are found; None if the content hashes do it."""

    def hashes(self) -> Hashes:
        """Return the content hashes of the documents, as a memory map."""
        return read_side_file(self.hashes_path, self.work_dir)

    def copy_hashes(self) -> Hashes:
        """Return the hashes that exact copies have in common, as a memory map."""
        return read_side_file(self.bodies_path or self.hashes_path, self.work_dir)

    def digests(self) -> Hashes64:
        """Return what decides which documents are held out, [documents]."""
        hashes = self.hashes()
        if self.records_path is not None:
            hashes = read_side_file(self.records_path, self.work_dir)
        return salted_digests(hashes["high"], hashes["low"])

    def signatures(self) -> Signatures:
        """Return the MinHash signatures of the documents, as a memory map."""
        return read_side_file(self.signatures_path, self.work_dir)


def numbered_parts(gathered: Sequence[SourceParts]) -> list[NumberedPart]:
    """Return all parts that hold documents, in the order of the mix.

    Raises:
        DataError: there are more documents than numbers.
    """
    numbered = []
    first = 0
    for source, parts in enumerate(gathered):
        for part, account in zip(parts.parts, parts.accounts, strict=True):
            stop = first + account.num_documents
            numbered.append(
                NumberedPart(
                    hashes_path=part.hashes_path,
                    signatures_path=part.signatures_path,
                    work_dir=part.work_dir,
                    source=source,
                    first=first,
                    stop=stop,
                    records_path=part.records_path if part.by_record else None,
                    bodies_path=part.bodies_path if part.has_bodies else None,
                )
            )
            first = stop
    if first > MAX_DOCUMENTS:
        raise DataError(
            f"the mix has {first:,} documents, more than {MAX_DOCUMENTS:,}. Split it in two mixes."
        )
    return numbered


def group_parts(
    parts: Sequence[NumberedPart], max_documents: int
) -> Iterator[tuple[NumberedPart, ...]]:
    """Yield groups of at most `max_documents`, or of one part that has more."""
    group: list[NumberedPart] = []
    for part in parts:
        if group and part.stop - group[0].first > max_documents:
            yield tuple(group)
            group = []
        group.append(part)
    if group:
        yield tuple(group)


def identity_of(gathered: Sequence[SourceParts]) -> list[Any]:
    """Return JSON values that tell the documents of a mix, and where their parts lie."""
    identity: list[Any] = []
    for parts in gathered:
        for part, account in zip(parts.parts, parts.accounts, strict=True):
            identity.append([str(part.shard_path), account.num_documents, account.shard_sha256])
    return identity


def document_ends(gathered: Sequence[SourceParts]) -> list[int]:
    """Return the number of documents up to the end of each source."""
    counts = []
    for parts in gathered:
        counts.append(sum(account.num_documents for account in parts.accounts))
    return [int(end) for end in np.cumsum(counts)]

"""Bits per byte of held-out documents under the present weights, in any layout.

    rows of a domain -> spread over data-parallel ranks -> token losses -> summed per document

Filler rows are added so that all ranks make equally many forward passes. A document's score is the
sum of nats over its predicted tokens: all but its first, end of text included; with a loss mask
those that bear loss. Bits per byte divides it by ln 2 and by the UTF-8 bytes of the document, or of
what its mask lets the model learn, which makes domains and tokenizers comparable.

Shape letters: B rows, S local tokens.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
import torch.distributed as dist

from cpt.parallel.agreement import gather_json, together
from cpt.parallel.topology import Topology
from cpt.training.loader import NO_SOURCE, MicroBatch, filler_row, make_micro_batch
from data_pipeline.dataset import IGNORED_LABEL, HeldOutSet, PackedRow
from data_pipeline.store.packing import Integers

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainScore:
    """The scores of one held-out domain."""

    name: str
    """Name of the domain."""
    language: str
    """Language of the domain."""
    nats: Floats
    """(documents,) summed negative log-likelihood of each scored document."""
    bytes: Floats
    """(documents,) UTF-8 bytes of each scored document; with a loss mask, of what bears loss."""

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of the whole domain."""
        return bits_per_byte(self.nats, self.bytes)

    @classmethod
    def from_json(cls, name: str, plain: Mapping[str, Any]) -> DomainScore:
        """Read a domain's entry of a baseline file."""
        return cls(
            name=name,
            language=plain["language"],
            nats=as_floats(plain["nats"]),
            bytes=np.asarray(plain["bytes"]),
        )


def as_floats(plain: Sequence[float | None]) -> Floats:
    """Return stored scores as an array; null stands for NaN."""
    return np.asarray(plain, dtype=np.float64)


def bits_per_byte(nats: Floats, num_bytes: Floats) -> float:
    """Return the bits per byte of documents taken together."""
    return float(nats.sum() / math.log(2) / num_bytes.sum())


class ScoredSet:
    """The documents of a held-out domain that are scored, in packed rows of their own."""

    def __init__(self, domain: HeldOutSet, documents: Integers) -> None:
        """Pack the documents; rows are read when they are scored.

        Args:
            domain: The held-out domain.
            documents: Their numbers within the domain.
        """
        self.name = domain.name
        self.language = domain.language
        self.documents = documents
        self.document_bytes = np.asarray(domain.document_bytes[documents], dtype=np.float64)
        self.seq_len = domain.seq_len
        self._packed = domain.pack(documents)

    @property
    def num_documents(self) -> int:
        """Number of documents."""
        return len(self.documents)

    @property
    def num_rows(self) -> int:
        """Number of packed rows."""
        return self._packed.num_rows

    def read_row(self, index: int) -> PackedRow:
        """Read one row; its `documents` are positions in `documents`."""
        return self._packed.read_row(index)

    def content_hash(self) -> str:
        """Return a hex sha256 of the documents, and of what of them is scored."""
        digest = hashlib.sha256(str(self.num_documents).encode())
        for index in range(self.num_rows):
            row = self.read_row(index)
            digest.update(row.input_ids.astype("<i8").tobytes())
            digest.update(row.documents.astype("<i8").tobytes())
            used = row.bounds[len(row.documents)]
            if (row.labels[:used] == IGNORED_LABEL).any():  # a loss mask
                digest.update(row.labels.astype("<i8").tobytes())
        return digest.hexdigest()


def content_hashes(sets: Sequence[tuple[HeldOutSet, Integers]], topology: Topology) -> list[str]:
    """Return the content hash of each set of documents on every rank.

    All ranks call it together and divide the sets, because all text of a set is read.

    Args:
        sets: Held-out domains, and the numbers of documents within them.
        topology: The layout.

    Raises:
        CptError: on all ranks: a document cannot be read.
    """

    def hash_own() -> list[str]:
        own = []
        for domain, documents in sets[topology.rank :: topology.world_size]:
            own.append(ScoredSet(domain, documents).content_hash())
        return own

    group = topology.control_group
    by_rank = gather_json(together(group, hash_own), group)
    hashes = []
    for place in range(len(sets)):
        round_number, rank = divmod(place, topology.world_size)
        hashes.append(by_rank[rank][round_number])
    return hashes


class Scorer(Protocol):
    """A model that can score: the training engine, or `cpt.offline.model.OfflineModel`."""

    def score(self, batch: MicroBatch) -> torch.Tensor:
        """Return the (B, S) nats of this rank's tokens on the CPU, without a backward pass."""
        ...


def score_domain(
    domain: ScoredSet, scorer: Scorer, topology: Topology, *, micro_batch_size: int
) -> DomainScore:
    """Score a domain; all ranks call it together and get the same numbers."""
    nats = torch.zeros(domain.num_documents, dtype=torch.float64)
    rows_per_pass = topology.dp_size * micro_batch_size
    for first in range(0, domain.num_rows, rows_per_pass):
        start = first + topology.dp_rank * micro_batch_size
        mine = []
        for index in range(start, start + micro_batch_size):
            is_row = index < domain.num_rows
            mine.append(domain.read_row(index) if is_row else filler_row(domain.seq_len))
        losses_BS = scorer.score(make_micro_batch(mine, [NO_SOURCE] * len(mine), topology)).double()
        for losses_S, row in zip(losses_BS, mine, strict=True):
            _add_by_document(nats, losses_S, row, topology)
    dist.all_reduce(nats, group=topology.control_group)
    return DomainScore(
        name=domain.name,
        language=domain.language,
        nats=nats.numpy(),
        bytes=domain.document_bytes,
    )


def _add_by_document(
    nats: torch.Tensor, losses_S: torch.Tensor, row: PackedRow, topology: Topology
) -> None:
    """Add this rank's part of a row to the documents it belongs to."""
    local = losses_S.numel()
    lengths = np.diff(row.bounds)[: len(row.documents)]
    document_of_token = torch.from_numpy(np.repeat(row.documents, lengths))
    mine = document_of_token[topology.sp_rank * local : (topology.sp_rank + 1) * local]
    nats.index_add_(0, mine, losses_S[: mine.numel()])

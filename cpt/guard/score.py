"""Bits per byte of held-out documents under the present weights, in any layout.

    rows of a domain -> spread over data-parallel ranks, filled up so that all do equally many
    forward passes
      -> token losses -> summed per document over ranks

A document's score is the sum of nats over its predicted tokens (all but its first, end of text
included); bits per byte divides by ln 2 and its UTF-8 bytes, which makes domains and tokenizers
comparable.
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

from cpt.parallel.topology import Topology
from cpt.training.loader import MicroBatch, filler_row, make_micro_batch
from data_pipeline.dataset import HeldOutSet, PackedRow

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True, slots=True)
class DomainScore:
    """Scores of one held-out domain."""

    name: str
    """Domain."""
    language: str
    """Language of the domain."""
    nats: Floats
    """(documents,) summed negative log-likelihood of each scored document."""
    bytes: Floats
    """(documents,) UTF-8 bytes of each scored document."""

    @property
    def bits_per_byte(self) -> float:
        """Over the whole domain."""
        return bits_per_byte(self.nats, self.bytes)

    @classmethod
    def from_json(cls, name: str, plain: Mapping[str, Any]) -> DomainScore:
        """Read what a baseline file holds of a domain."""
        nats, num_bytes = as_floats(plain["nats"]), np.asarray(plain["bytes"])
        return cls(name=name, language=plain["language"], nats=nats, bytes=num_bytes)


def as_floats(plain: Sequence[float | None]) -> Floats:
    """Stored scores; null stands for what is not a number."""
    return np.asarray([math.nan if value is None else value for value in plain])


def bits_per_byte(nats: Floats, num_bytes: Floats) -> float:
    """Bits per byte of documents taken together."""
    return float(nats.sum() / math.log(2) / num_bytes.sum())


class ScoredSet:
    """The documents of a held-out domain that are scored, and the packed rows they lie in."""

    def __init__(self, domain: HeldOutSet, max_documents: int) -> None:
        self.name, self.language = domain.name, domain.language
        self.num_documents = min(domain.num_documents, max_documents)
        self.document_bytes = np.asarray(
            domain.document_bytes[: self.num_documents], dtype=np.float64
        )
        rows = (domain.read_row(index) for index in range(domain.num_rows))
        self.rows = [row for row in rows if (row.documents < self.num_documents).any()]
        digest = hashlib.sha256(str(self.num_documents).encode())
        for row in self.rows:
            digest.update(
                row.input_ids.astype("<i8").tobytes() + row.documents.astype("<i8").tobytes()
            )
        self.content_hash = digest.hexdigest()


class Scorer(Protocol):
    """A model that can score: the training engine, or weights without one."""

    def score(self, batch: MicroBatch) -> torch.Tensor:
        """(B, S) nats of this rank's tokens, on the CPU, without a backward pass."""
        ...


def score_domain(
    domain: ScoredSet, scorer: Scorer, topology: Topology, *, micro_batch_size: int
) -> DomainScore:
    """Score a domain; all ranks call it together and get the same numbers."""
    nats = torch.zeros(
        1 + max(int(row.documents.max()) for row in domain.rows), dtype=torch.float64
    )
    per_pass = topology.dp_size * micro_batch_size
    padded = domain.rows + [filler_row(len(domain.rows[0].input_ids))] * (
        -len(domain.rows) % per_pass
    )
    for first in range(0, len(padded), per_pass):
        start = first + topology.dp_rank * micro_batch_size
        mine = padded[start : start + micro_batch_size]
        losses_BS = scorer.score(make_micro_batch(mine, [-1] * len(mine), topology)).double()
        for losses_S, row in zip(losses_BS, mine, strict=True):
            _add_by_document(nats, losses_S, row, topology)
    dist.all_reduce(nats, group=topology.control_group)
    scored = nats[: domain.num_documents].numpy()
    return DomainScore(
        name=domain.name, language=domain.language, nats=scored, bytes=domain.document_bytes
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

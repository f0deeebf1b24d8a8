"""Packed rows -> this rank's tensors.

    global batch (row ids, a pure function of the step)
      -> rows of this data-parallel rank and micro step
      -> inputs, labels and positions of this sequence-parallel rank's tokens + document bounds of
      the whole rows

Every rank reads what it needs from the memory-mapped shards itself; no data is broadcast.  Labels
were shifted when the row was packed, so cutting a row between ranks loses no prediction.

Shape letters: B rows of the micro batch, T tokens of a row, S local tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from cpt.model.attention import PackedRows
from cpt.model.loss.divergence import TopK
from cpt.parallel.topology import Topology
from cpt.training.kl_targets import KLTargets
from data_pipeline.dataset import IGNORED_LABEL, BuiltData, PackedRow
from data_pipeline.mixture.mixture import GlobalBatch
from data_pipeline.text.tokenizer import END_OF_TEXT


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """What one rank feeds to one forward pass."""

    input_ids: torch.Tensor
    """(B, S) local tokens."""
    labels: torch.Tensor
    """(B, S) next tokens; -100 where there is none."""
    position_ids: torch.Tensor
    """(B, S) positions within the document."""
    packed_rows: PackedRows
    """Document bounds of the whole rows."""
    row_labels: torch.Tensor
    """(B,) what each row counts as: its source, or -1 for a filler row."""
    targets: TopK | None = None
    """The base model's distribution for the tokens of some rows; None if there is none for any."""


def rows_of_rank(
    batch: GlobalBatch, micro_step: int, micro_batch_size: int, topology: Topology
) -> list[int]:
    """Positions in the global batch of this rank's rows in one micro step."""
    first = (micro_step * topology.dp_size + topology.dp_rank) * micro_batch_size
    return list(range(first, first + micro_batch_size))


def load_micro_batch(
    data: BuiltData,
    batch: GlobalBatch,
    micro_step: int,
    micro_batch_size: int,
    topology: Topology,
    kl_targets: KLTargets | None = None,
) -> MicroBatch:
    """Read one micro batch of a global batch, with its targets where there are any."""
    positions = rows_of_rank(batch, micro_step, micro_batch_size, topology)
    places = [(int(batch.sources[position]), int(batch.rows[position])) for position in positions]
    rows = [data.read_row(source, row) for source, row in places]
    micro_batch = make_micro_batch(rows, [source for source, _ in places], topology)
    if kl_targets is None:
        return micro_batch
    return replace(micro_batch, targets=kl_targets.of_rows(places, topology, data.seq_len))


def make_micro_batch(
    rows: Sequence[PackedRow], row_labels: Sequence[int], topology: Topology
) -> MicroBatch:
    """Cut rows to this rank's tokens and put them on its device."""
    seq_len = len(rows[0].input_ids)
    local = seq_len // topology.sp_size
    span = slice(topology.sp_rank * local, (topology.sp_rank + 1) * local)

    def stack(name: str) -> torch.Tensor:
        array = np.stack([getattr(row, name)[span] for row in rows])
        return torch.from_numpy(array).to(topology.device)

    return MicroBatch(
        input_ids=stack("input_ids"),
        labels=stack("labels"),
        position_ids=stack("position_ids"),
        packed_rows=PackedRows.from_bounds([row.bounds for row in rows], seq_len),
        row_labels=torch.tensor(row_labels, device=topology.device),
    )


def filler_row(seq_len: int) -> PackedRow:
    """A row without a single label, for ranks that have nothing to do while others score."""
    return PackedRow(
        input_ids=np.full(seq_len, END_OF_TEXT, dtype=np.int64),
        labels=np.full(seq_len, IGNORED_LABEL, dtype=np.int64),
        position_ids=np.arange(seq_len, dtype=np.int64),
        bounds=[0, seq_len],
        documents=np.empty(0, dtype=np.int64),
    )

"""Loading of micro batches: packed rows become the tensors of this rank.

    global batch (row ids, a pure function of the step)
      -> rows of this data-parallel rank and micro step
      -> inputs, labels and positions of this sequence-parallel rank's tokens, and the document
         bounds of the whole rows

Every rank reads what it needs from the memory-mapped shards itself; no data is broadcast. Labels
were shifted when the row was packed, so cutting a row between ranks loses no prediction.

Shape letters: B rows of the micro batch, T tokens of a row, S local tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cpt.model.attention import PackedRows
from cpt.model.loss.divergence import TopKTargets
from cpt.parallel.topology import Topology
from cpt.training.kl_targets import KLTargets
from data_pipeline.dataset import IGNORED_LABEL, BuiltData, PackedRow
from data_pipeline.mixture.mixture import GlobalBatch
from data_pipeline.text.tokenizer import END_OF_TEXT

NO_SOURCE = -1
"""Source number of a row that is not from the data mix."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Input of one forward pass on one rank.

    The tensors with a dimension S hold this rank's slice of each row. `packed_rows` describes the
    whole rows, because attention reaches beyond the slice.
    """

    input_ids: torch.Tensor
    """(B, S) local tokens."""
    labels: torch.Tensor
    """(B, S) tokens that follow them; -100 where nothing is predicted."""
    num_labels: int
    """How many of the labels are not -100; the loss head would wait for the device to count."""
    position_ids: torch.Tensor
    """(B, S) positions within the document."""
    packed_rows: PackedRows
    """Document bounds of the whole rows, T tokens each."""
    source_of_row: torch.Tensor
    """(B,) number of each row's source, on the CPU; `NO_SOURCE` if it is not from the data mix."""
    targets: TopKTargets | None
    """The base model's distribution for some of the local tokens; None if there is none."""


def rows_of_rank(
    batch: GlobalBatch, micro_step: int, micro_batch_size: int, topology: Topology
) -> list[int]:
    """Return the positions in the global batch of this rank's rows in one micro step."""
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
    sources = []
    places = []
    for position in rows_of_rank(batch, micro_step, micro_batch_size, topology):
        source = int(batch.sources[position])
        sources.append(source)
        places.append((source, int(batch.rows[position])))
    rows = [data.read_row(source, row) for source, row in places]
    targets = None
    if kl_targets is not None:
        targets = kl_targets.of_rows(places, topology, data.seq_len)
    return make_micro_batch(rows, sources, topology, targets)


def make_micro_batch(
    rows: Sequence[PackedRow],
    source_of_row: Sequence[int],
    topology: Topology,
    targets: TopKTargets | None = None,
) -> MicroBatch:
    """Cut rows to this rank's tokens and put them on its device.

    Args:
        rows: Whole rows of one length, which the sequence-parallel size divides.
        source_of_row: Number of each row's source, or `NO_SOURCE`.
        topology: This rank's part of a row, and its device.
        targets: The base model's distribution for some of the local tokens.
    """
    seq_len = len(rows[0].input_ids)
    local = seq_len // topology.sp_size
    span = slice(topology.sp_rank * local, (topology.sp_rank + 1) * local)

    def stack(name: str) -> torch.Tensor:
        array = np.stack([getattr(row, name)[span] for row in rows])
        return torch.from_numpy(array).to(topology.device)

    return MicroBatch(
        input_ids=stack("input_ids"),
        labels=stack("labels"),
        num_labels=_count_labels(rows, span),
        position_ids=stack("position_ids"),
        packed_rows=PackedRows.from_bounds([row.bounds for row in rows], seq_len),
        source_of_row=torch.tensor(source_of_row),
        targets=targets,
    )


def _count_labels(rows: Sequence[PackedRow], span: slice) -> int:
    count = 0
    for row in rows:
        count += int(np.count_nonzero(row.labels[span] != IGNORED_LABEL))
    return count


def filler_row(seq_len: int) -> PackedRow:
    """Return a row without a single label, for ranks that idle while others score."""
    return PackedRow(
        input_ids=np.full(seq_len, END_OF_TEXT, dtype=np.int64),
        labels=np.full(seq_len, IGNORED_LABEL, dtype=np.int64),
        position_ids=np.arange(seq_len, dtype=np.int64),
        bounds=[0, seq_len],
        documents=np.empty(0, dtype=np.int64),
    )

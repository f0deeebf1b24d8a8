"""Loading of micro batches: packed rows become the tensors of this rank.

    global batch (row ids, a pure function of the step)
      -> rows of this data-parallel rank and micro step
      -> on the host: inputs, labels and positions of this sequence-parallel rank's tokens, and the
         document bounds of the whole rows
      -> on the device: the same, by copies for which the host does not wait

Every rank reads what it needs from the shards itself; no data is broadcast. Of a row that several
ranks share each reads its own slots and the token after them, which is the last label: so cutting a
row between ranks loses no prediction.

Shape letters: B rows of the micro batch, T tokens of a row, S local tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from cpt.model.attention import PackedRows
from cpt.model.attention.placement import place_documents
from cpt.model.loss.divergence import TopKTargets
from cpt.parallel.halo import WindowHalo
from cpt.parallel.topology import Topology
from cpt.storage.transfer import pinned, to_device
from cpt.training.kl_targets import KLTargets, LabeledSlots
from data_pipeline.dataset import IGNORED_LABEL, BuiltData, PackedRow
from data_pipeline.mixture.mixture import GlobalBatch
from data_pipeline.text.tokenizer import END_OF_TEXT

NO_SOURCE = -1
"""Source number of a row that is not from the data mix."""

Places = tuple[tuple[int, int], ...]
"""Source and row number within the source of each row of a micro batch."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MicroBatch:
    """Input of one forward pass on one rank, on the host or on the device.

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


def places_of_rank(
    batch: GlobalBatch, micro_step: int, micro_batch_size: int, topology: Topology
) -> Places:
    """Return the places of this rank's rows in one micro step of a global batch."""
    first = (micro_step * topology.dp_size + topology.dp_rank) * micro_batch_size
    places = []
    for position in range(first, first + micro_batch_size):
        places.append((int(batch.sources[position]), int(batch.rows[position])))
    return tuple(places)


def read_micro_batch(
    data: BuiltData, places: Places, topology: Topology, kl_targets: KLTargets | None = None
) -> MicroBatch:
    """Read this rank's part of rows, with its targets where there are any, on the host.

    Of the tokens of the other ranks of a row none is read.
    """
    span = span_of_rank(data.seq_len, topology)
    rows = [data.read_row(source, row, span) for source, row in places]
    sources = [source for source, _ in places]
    targets = None
    if kl_targets is not None:
        targets = kl_targets.of_rows(_labeled_slots(data, places, rows, span, kl_targets))
    return _stacked(rows, sources, data.seq_len, slice(None), targets)


def _labeled_slots(
    data: BuiltData,
    places: Places,
    rows: Sequence[PackedRow],
    span: slice,
    kl_targets: KLTargets,
) -> list[LabeledSlots]:
    """Return what the targets of the slots `span` of some rows are found by."""
    found = []
    for (source, row), packed in zip(places, rows, strict=True):
        before = 0
        if kl_targets.has_source(source):
            before = data.labels_before(source, row, span.start)
        found.append(
            LabeledSlots(source=source, row=row, labels=packed.labels, labels_before=before)
        )
    return found


def span_of_rank(seq_len: int, topology: Topology) -> slice:
    """Return the slots of a row that are this rank's."""
    local = seq_len // topology.sp_size
    return slice(topology.sp_rank * local, (topology.sp_rank + 1) * local)


def make_micro_batch(
    rows: Sequence[PackedRow],
    source_of_row: Sequence[int],
    topology: Topology,
    targets: TopKTargets | None = None,
) -> MicroBatch:
    """Cut rows to this rank's tokens and put them on its device; see `cut_rows` and `send`."""
    return send(cut_rows(rows, source_of_row, topology, targets), topology.device)


def cut_rows(
    rows: Sequence[PackedRow],
    source_of_row: Sequence[int],
    topology: Topology,
    targets: TopKTargets | None = None,
) -> MicroBatch:
    """Cut rows to this rank's tokens, on the host.

    Args:
        rows: Whole rows of one length, which the sequence-parallel size divides.
        source_of_row: Number of each row's source, or `NO_SOURCE`.
        topology: This rank's part of a row.
        targets: The base model's distribution for some of the local tokens, on the CPU.
    """
    seq_len = len(rows[0].input_ids)
    return _stacked(rows, source_of_row, seq_len, span_of_rank(seq_len, topology), targets)


def _stacked(
    rows: Sequence[PackedRow],
    source_of_row: Sequence[int],
    seq_len: int,
    span: slice,
    targets: TopKTargets | None,
) -> MicroBatch:
    """Return the slots `span` of what was read of rows of `seq_len` tokens."""

    def stack(name: str) -> torch.Tensor:
        return torch.from_numpy(np.stack([getattr(row, name)[span] for row in rows]))

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


def pin(batch: MicroBatch, device: torch.device) -> MicroBatch:
    """Bring what goes to a GPU into page-locked memory, which `send` would do otherwise."""
    return batch if device.type != "cuda" else _with_tensors(batch, pinned)


def send(batch: MicroBatch, device: torch.device, halo: WindowHalo | None = None) -> MicroBatch:
    """Copy a micro batch from the host to a device, with all that its layers need of its documents.

    The host does not wait. What stays on the host is what the host reads later.

    Args:
        batch: The micro batch, on the host.
        device: The device of this rank.
        halo: The exchange of the window layers, if there is one.
    """
    place_documents(batch.packed_rows, device, halo)
    return _with_tensors(batch, lambda tensor: to_device(tensor, device))


def _with_tensors(batch: MicroBatch, move: Callable[[torch.Tensor], torch.Tensor]) -> MicroBatch:
    """Return a micro batch whose tensors for the device have been moved."""
    targets = batch.targets
    if targets is not None:
        targets = TopKTargets(
            at_n=move(targets.at_n),
            ids_nk=move(targets.ids_nk),
            log_p_nK=move(targets.log_p_nK),
        )
    return replace(
        batch,
        input_ids=move(batch.input_ids),
        labels=move(batch.labels),
        position_ids=move(batch.position_ids),
        targets=targets,
    )


def filler_row(seq_len: int) -> PackedRow:
    """Return a row without a single label, for ranks that idle while others score."""
    return PackedRow(
        input_ids=np.full(seq_len, END_OF_TEXT, dtype=np.int64),
        labels=np.full(seq_len, IGNORED_LABEL, dtype=np.int64),
        position_ids=np.arange(seq_len, dtype=np.int64),
        bounds=[0, seq_len],
        documents=np.empty(0, dtype=np.int64),
    )

"""Traces as rows of a forward pass: which slots bear loss, and which stored targets are theirs.

    prompt  <|start|>system ... <|start|>assistant     reply  <|channel|>analysis ... <|return|>
    slots   every token but the last of the reply, in order
    labels  the reply's tokens; the prompt is read, not measured

Traces stand in their order and are not cut, so the targets of a row follow each other in the file,
as do those of the part of a row that a sequence-parallel rank holds.

Shape letters: T slots of a row, S those of this rank, n slots with a label, B rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from cpt.guard.traces.tokens import control_mask
from cpt.model.loss.divergence import TopKTargets
from cpt.parallel.topology import Topology
from cpt.training.kl_target_format import TargetFileReader
from cpt.training.loader import filler_row
from data_pipeline.dataset import IGNORED_LABEL, PackedRow
from data_pipeline.store.packing import Integers


@dataclass(frozen=True, kw_only=True, slots=True)
class Trace:
    """A reply that the untouched model wrote, and what it replied to."""

    prompt: Sequence[int]
    """Tokens up to where the assistant begins."""
    reply: Sequence[int]
    """Tokens of the assistant, the one that ended the reply included; at least one."""

    @property
    def num_slots(self) -> int:
        """Slots that the trace takes in a row."""
        return len(self.prompt) + len(self.reply) - 1


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceRow:
    """One row of whole traces."""

    packed: PackedRow
    """The row; `documents` are the numbers of the traces."""
    first_target: int
    """Place of the row's first label among the labels of all traces."""
    cell_of_slot: Integers
    """(T,) twice the number of the trace, plus 1 for a control token; only of slots with a label.
    """

    def label_slots(self, topology: Topology) -> Integers:
        """Return (n,) the slots of this rank that have a label, counted from its first."""
        span = _span(self.packed, topology)
        return np.flatnonzero(self.packed.labels[span] != IGNORED_LABEL)

    def cells(self, topology: Topology) -> Integers:
        """Return (n,) `cell_of_slot` of this rank's slots that have a label."""
        return self.cell_of_slot[_span(self.packed, topology)][self.label_slots(topology)]

    def target_range(self, topology: Topology) -> tuple[int, int]:
        """Return the places of this rank's labels among those of all traces: [begin, end)."""
        span = _span(self.packed, topology)
        before = np.count_nonzero(self.packed.labels[: span.start] != IGNORED_LABEL)
        begin = self.first_target + int(before)
        return begin, begin + len(self.label_slots(topology))


def _span(row: PackedRow, topology: Topology) -> slice:
    local = len(row.labels) // topology.sp_size
    return slice(topology.sp_rank * local, (topology.sp_rank + 1) * local)


def pack_traces(traces: Sequence[Trace], seq_len: int) -> list[TraceRow]:
    """Return rows that hold all traces in their order, each as a whole.

    Args:
        traces: At least one; none takes more than `seq_len` slots.
        seq_len: Slots of a row.
    """
    rows = []
    first = 0
    slots = 0
    first_target = 0
    for number, trace in enumerate(traces):
        assert trace.num_slots <= seq_len, f"trace {number} takes {trace.num_slots} slots"
        if slots + trace.num_slots > seq_len:
            rows.append(_row(traces, first, number, seq_len, first_target))
            first_target += sum(len(one.reply) for one in traces[first:number])
            first = number
            slots = 0
        slots += trace.num_slots
    rows.append(_row(traces, first, len(traces), seq_len, first_target))
    return rows


def _row(
    traces: Sequence[Trace], first: int, last: int, seq_len: int, first_target: int
) -> TraceRow:
    """Return the row of the traces [first, last)."""
    empty = filler_row(seq_len)
    input_ids = empty.input_ids
    labels = empty.labels
    cell_of_slot = np.full(seq_len, -1, dtype=np.int64)
    bounds = [0]
    for number in range(first, last):
        trace = traces[number]
        begin = bounds[-1]
        end = begin + trace.num_slots
        input_ids[begin:end] = [*trace.prompt, *trace.reply[:-1]]
        labels[end - len(trace.reply) : end] = trace.reply
        cell_of_slot[end - len(trace.reply) : end] = 2 * number + control_mask(trace.reply)
        bounds.append(end)
    if bounds[-1] < seq_len:
        bounds.append(seq_len)
    packed = PackedRow(
        input_ids=input_ids,
        labels=labels,
        position_ids=np.arange(seq_len) - np.repeat(bounds[:-1], np.diff(bounds)),
        bounds=bounds,
        documents=np.arange(first, last),
    )
    return TraceRow(packed=packed, first_target=first_target, cell_of_slot=cell_of_slot)


def targets_of(
    rows: Sequence[TraceRow], file: TargetFileReader, topology: Topology
) -> TopKTargets | None:
    """Return the stored targets of this rank's part of rows, on the CPU; None if it has none."""
    at = []
    ids = []
    log_p = []
    for index, row in enumerate(rows):
        begin, end = row.target_range(topology)
        if begin == end:
            continue
        local = len(row.packed.labels) // topology.sp_size
        row_ids, row_log_p = file.read(begin, end)
        at.append(torch.from_numpy(row.label_slots(topology) + index * local))
        ids.append(row_ids)
        log_p.append(row_log_p)
    if not at:
        return None
    return TopKTargets(
        at_n=torch.cat(at), ids_nk=torch.cat(ids).to(torch.int64), log_p_nK=torch.cat(log_p)
    )


def filler_trace_row(seq_len: int) -> TraceRow:
    """Return a row without a label, for ranks that idle while others measure."""
    cell_of_slot = np.full(seq_len, -1, dtype=np.int64)
    return TraceRow(packed=filler_row(seq_len), first_target=0, cell_of_slot=cell_of_slot)

"""The divergence of the present model from the untouched one on traces, in any layout.

    traces -> rows, spread over data-parallel ranks -> KL(untouched || present) of each token of the
    replies -> sums per trace, of text and of control tokens -> nats a token of each trace

Filler rows are added so that all ranks make equally many forward passes.

Shape letters: B rows, S local tokens, n of them with a label, k listed tokens.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import torch.distributed as dist

from cpt.guard.score import Floats, Scorer
from cpt.guard.traces.rows import Trace, TraceRow, filler_trace_row, pack_traces, targets_of
from cpt.guard.traces.tokens import control_mask
from cpt.parallel.topology import Topology
from cpt.training.kl_target_format import TargetFileReader
from cpt.training.loader import NO_SOURCE, MicroBatch, make_micro_batch


class TopKModel(Protocol):
    """A model that lists its likeliest next tokens, such as the training engine."""

    def top_k(self, batch: MicroBatch, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (n, k) ids and (n, k + 1) log-probabilities of this rank's labeled tokens."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """How the rows of a forward pass are laid out."""

    topology: Topology
    """The layout."""
    micro_batch_size: int
    """Rows of a forward pass of one rank."""
    seq_len: int
    """Slots of a row."""

    @property
    def rows_per_pass(self) -> int:
        """Rows of a forward pass of all ranks."""
        return self.topology.dp_size * self.micro_batch_size

    def batches(self, rows: Sequence[TraceRow]) -> Iterator[list[TraceRow]]:
        """Yield the rows of all ranks for each forward pass, filler rows at the end."""
        for first in range(0, len(rows), self.rows_per_pass):
            batch = list(rows[first : first + self.rows_per_pass])
            while len(batch) < self.rows_per_pass:
                batch.append(filler_trace_row(self.seq_len))
            yield batch

    def mine(self, batch: Sequence[TraceRow]) -> list[TraceRow]:
        """Return the rows of this rank."""
        start = self.topology.dp_rank * self.micro_batch_size
        return list(batch[start : start + self.micro_batch_size])


@dataclass(frozen=True, kw_only=True, slots=True)
class TraceDivergence:
    """The divergence on each trace of a domain, in nats a token."""

    text: Floats
    """(traces,) mean over the tokens of text; only of traces that have some."""
    control: Floats
    """(traces,) mean over the control tokens; only of traces that have some."""


def measure_divergence(
    traces: Sequence[Trace], targets: TargetFileReader, scorer: Scorer, passes: Passes
) -> TraceDivergence:
    """Measure a model on traces; all ranks call it together and get the same numbers.

    Args:
        traces: The traces, in the order of their targets.
        targets: Likeliest next tokens of the untouched model.
        scorer: The present model.
        passes: Layout of the rows.
    """
    topology = passes.topology
    sums = torch.zeros(2 * len(traces), dtype=torch.float64)
    for batch in passes.batches(pack_traces(traces, passes.seq_len)):
        mine = passes.mine(batch)
        found = targets_of(mine, targets, topology)
        packed = [row.packed for row in mine]
        losses = scorer.score(make_micro_batch(packed, [NO_SOURCE] * len(mine), topology, found))
        if found is None:
            continue  # the forward passes of this rank and the others are the same without targets
        cells = torch.from_numpy(np.concatenate([row.cells(topology) for row in mine]))
        divergence_n = losses[1].double().flatten()[found.at_n]
        sums.index_add_(0, cells, divergence_n)
    dist.all_reduce(sums, group=topology.control_group)
    return _per_token(sums.numpy(), traces)


def _per_token(sums: Floats, traces: Sequence[Trace]) -> TraceDivergence:
    counts = np.zeros((len(traces), 2))
    for number, trace in enumerate(traces):
        num_control = int(control_mask(trace.reply).sum())
        counts[number] = (len(trace.reply) - num_control, num_control)
    by_trace = sums.reshape(-1, 2)
    has_some = counts > 0
    # rounding may leave a divergence just below 0; NaN stays NaN
    means = np.maximum(by_trace / np.maximum(counts, 1), 0)
    return TraceDivergence(text=means[has_some[:, 0], 0], control=means[has_some[:, 1], 1])


def likeliest_tokens(
    traces: Sequence[Trace], model: TopKModel, top_k: int, passes: Passes
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield the targets of traces, in their order; all ranks call it together and get the same.

    Args:
        traces: The traces.
        model: The untouched model.
        top_k: Tokens to list.
        passes: Layout of the rows.

    Yields:
        (n, k) ids and (n, k + 1) log-probabilities of the next n tokens of replies.
    """
    topology = passes.topology
    for batch in passes.batches(pack_traces(traces, passes.seq_len)):
        num_tokens = sum(int((row.packed.labels >= 0).sum()) for row in batch)
        mine = passes.mine(batch)
        packed = [row.packed for row in mine]
        ids, log_p = model.top_k(make_micro_batch(packed, [NO_SOURCE] * len(mine), topology), top_k)
        # One rank has a value for each token, the others 0. Token ids are exact in fp32.
        found = torch.zeros(num_tokens, 2 * top_k + 1)
        taken = 0
        for row in mine:
            begin, end = row.target_range(topology)
            first = begin - batch[0].first_target
            last = end - batch[0].first_target
            if begin < end:
                found[first:last, :top_k] = ids[taken : taken + end - begin].float()
                found[first:last, top_k:] = log_p[taken : taken + end - begin].float()
            taken += end - begin
        dist.all_reduce(found, group=topology.control_group)
        yield found[:, :top_k].to(torch.int32), found[:, top_k:].clone()

"""(ledger, seed, step) -> the rows of a global batch.

    step -> index of its first row in the run -> nearest snapshot before it -> choose a source per
    row
                                                                                   |
                                   shuffled order of that source in its epoch <----+-> (source, row,
                                   epoch)

Choice of the source (WF2Q: Bennett and Zhang, INFOCOM 1996)
    Source i has weight w_i and has given e_i predicted tokens, all sources together E; its next row
    has l_i tokens. Among the sources that are not ahead of their share (e_i <= w_i E) the one whose
    next row is due first, at (e_i + l_i) / w_i tokens of the run, gives the row.  At every prefix
    then
        -L <= w_i E - e_i <= L      where L is the largest row, at most seq_len.
    Picking the largest deficit is simpler, but lets a large source fall behind by more than a row
    while small ones catch up: 1.4 rows with weights .855, .093, .048, .004
    (tests/data_pipeline/mixture/test_mixture.py).

Decisions
    Nothing here knows ranks, workers or accumulation: they slice what `global_batch` returns.
    Tokens are counted as labels, the ones that bear loss, so rows with padding count for what they
    hold. Order inside a source: every row once per epoch, sorted by a keyed hash of the row number.
    Weights change at segment borders: the token account starts anew there, the place in each source
    goes on, so no row is lost or repeated.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import heapq
import math
from collections import OrderedDict
from typing import Protocol

import numpy as np

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.mixture.ledger import Ledger, Segment
from data_pipeline.store.hashing import splitmix64
from data_pipeline.store.packing import Integers

SNAPSHOT_ROWS = 1 << 14
"""Rows of the run between two snapshots; bounds the work of a step back."""
_CURSOR_ROWS = 1 << 10


class RowCounts(Protocol):
    """What the mixture needs to know about a build."""

    source_names: tuple[str, ...]

    def row_tokens(self, source: int) -> Integers:
        """Predicted tokens of each training row."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GlobalBatch:
    """The rows of one optimizer step; B = global_batch_size."""

    step: int
    sources: Integers
    """[B] positions in `source_names`."""
    rows: Integers
    """[B] row numbers within the source."""
    predicted_tokens: Integers
    """[B] labels in each row."""
    epochs: Integers
    """[B] how often the source was read to its end before."""

    def chain_hash(self, previous: str) -> str:
        """Hex sha256 over the hash of the step before ('' at step 0) and this step's rows."""
        digest = hashlib.sha256(f"{previous}:{self.step}:{len(self.rows)}:".encode())
        for values in (self.sources, self.rows, self.epochs):
            digest.update(values.astype("<i8").tobytes())
        return digest.hexdigest()


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """A place between two rows of the run."""

    drawn_rows: tuple[int, ...]
    """Rows each source has given since step 0."""
    segment_tokens: tuple[int, ...]
    """Predicted tokens each source has given in the current segment."""


class Mixture:
    """The rows of every step, in whatever order the steps are asked for."""

    def __init__(self, built: RowCounts, ledger: Ledger, seed: int) -> None:
        """Args: `built` gives row sizes, `ledger` the weights over time, `seed` the order within
        sources.

        Raises:
            ConfigError: the ledger names a source that is not built.
            DataError: a source has a weight but no rows.
        """
        self._names = built.source_names
        self._row_tokens = [built.row_tokens(source) for source in range(len(self._names))]
        self._ledger = ledger
        self.seed = seed
        for segment in ledger.segments:
            for name, weight in segment.weights.items():
                if name not in self._names:
                    raise ConfigError(
                        f"mix ledger: source '{name}' is not in the build ({', '.join(self._names)})."
                    )
                if weight > 0 and not len(self._row_tokens[self._names.index(name)]):
                    raise DataError(f"source '{name}' has weight {weight:g} but no training rows.")
        self._orders: OrderedDict[tuple[int, int], tuple[Integers, Integers]] = OrderedDict()
        self._global_batch_size = 0
        self._snapshots: dict[int, Position] = {}
        self._snapshot_indices: list[int] = []
        self._latest = (0, self._origin())

    def global_batch(self, step: int, global_batch_size: int) -> GlobalBatch:
        """The rows of one step.

        Raises:
            DataError: a source is asked for more epochs than its max_epochs.
        """
        first = step * global_batch_size
        position = self._position_at(first, global_batch_size)
        chosen: list[tuple[int, int]] = []
        position = self._advance(position, first, global_batch_size, chosen)
        self._latest = (first + global_batch_size, position)
        self._check_epochs(step, position)
        batch = np.empty((4, global_batch_size), dtype=np.int64)
        for index, (source, drawn) in enumerate(chosen):
            epoch, place = divmod(drawn, len(self._row_tokens[source]))
            rows, tokens = self._order(source, epoch)
            batch[:, index] = source, rows[place], tokens[place], epoch
        return GlobalBatch(
            step=step, sources=batch[0], rows=batch[1], predicted_tokens=batch[2], epochs=batch[3]
        )

    def position(self, step: int, global_batch_size: int) -> Position:
        """What was drawn before `step`; epoch limits are not enforced here, so a plan can list all
        that break.
        """
        return self._position_at(step * global_batch_size, global_batch_size)

    def epoch_tokens(self, source: int, epoch: int) -> Integers:
        """Predicted tokens of the rows of a source, in the order of an epoch."""
        return self._order(source, epoch)[1]

    def _origin(self) -> Position:
        zeros = (0,) * len(self._names)
        return Position(drawn_rows=zeros, segment_tokens=zeros)

    def _position_at(self, index: int, global_batch_size: int) -> Position:
        """The position before row `index` of the run."""
        if global_batch_size != self._global_batch_size:
            # segment borders are steps, so where they lie among the rows depends on the batch size
            self._global_batch_size = global_batch_size
            self._snapshots, self._snapshot_indices = {0: self._origin()}, [0]
            self._latest = (0, self._origin())
        start = self._snapshot_indices[bisect.bisect_right(self._snapshot_indices, index) - 1]
        position = self._snapshots[start]
        if start < self._latest[0] <= index:
            start, position = self._latest
        while start < index:
            count = min(index - start, SNAPSHOT_ROWS)
            position = self._advance(position, start, count, None)
            start += count
        self._latest = (index, position)
        return position

    def _note(self, index: int, position: Position) -> None:
        """Keep a snapshot if one is due."""
        if index - self._snapshot_indices[-1] >= SNAPSHOT_ROWS:
            self._snapshots[index] = position
            self._snapshot_indices.append(index)

    def _advance(
        self, position: Position, index: int, count: int, chosen: list[tuple[int, int]] | None
    ) -> Position:
        """Draw `count` rows from row `index` of the run on; `chosen` takes (source, rows drawn from
        it before).
        """
        while count:
            segment, ends = self._segment_at(index)
            position = self._enter(segment, index, position)
            part = count if ends is None else min(count, ends - index)
            position = self._choose(position, segment, part, chosen)
            index += part
            count -= part
        self._note(index, position)
        return position

    def _enter(self, segment: Segment, index: int, position: Position) -> Position:
        """`position`, with a new token account if `index` is the first row of the segment."""
        if index == segment.start_step * self._global_batch_size:
            return dataclasses.replace(position, segment_tokens=self._origin().segment_tokens)
        return position

    def _segment_at(self, index: int) -> tuple[Segment, int | None]:
        """The segment that row `index` falls into, and the row at which the next one begins."""
        starts = [segment.start_step * self._global_batch_size for segment in self._ledger.segments]
        number = bisect.bisect_right(starts, index) - 1
        return self._ledger.segments[number], starts[number + 1] if number + 1 < len(
            starts
        ) else None

    def _choose(
        self, position: Position, segment: Segment, count: int, chosen: list[tuple[int, int]] | None
    ) -> Position:
        """The rule of the module docstring, `count` times."""
        drawn, given = list(position.drawn_rows), list(position.segment_tokens)
        total = sum(given)
        weights = self._weights(segment)
        cursors = [_Cursor(self, source, drawn[source]) for source in range(len(drawn))]
        # waiting: (e / w, rank, source); due: ((e + l) / w, rank, source).  Ranks by name: the
        # order of sources in the mix does not matter.
        ranks = {
            source: rank for rank, source in enumerate(sorted(weights, key=self._names.__getitem__))
        }
        waiting = [
            (given[source] / weight, ranks[source], source) for source, weight in weights.items()
        ]
        heapq.heapify(waiting)
        due: list[tuple[float, int, int]] = []
        for _ in range(count):
            # someone is always at or behind the share; rounding may hide that, then the one nearest
            # to it goes
            while waiting and (waiting[0][0] <= total or not due):
                _, rank, source = heapq.heappop(waiting)
                heapq.heappush(
                    due,
                    ((given[source] + cursors[source].next_tokens) / weights[source], rank, source),
                )
            _, rank, source = heapq.heappop(due)
            if chosen is not None:
                chosen.append((source, drawn[source]))
            total += cursors[source].next_tokens
            given[source] += cursors[source].next_tokens
            drawn[source] += 1
            cursors[source].step()
            heapq.heappush(waiting, (given[source] / weights[source], rank, source))
        return Position(drawn_rows=tuple(drawn), segment_tokens=tuple(given))

    def _weights(self, segment: Segment) -> dict[int, float]:
        """Weight by source, those of 0 left out, scaled to sum to 1."""
        total = math.fsum(segment.weights.values())
        return {
            self._names.index(name): weight / total
            for name, weight in segment.weights.items()
            if weight > 0
        }

    def _order(self, source: int, epoch: int) -> tuple[Integers, Integers]:
        """Row numbers of a source in the order of an epoch, and their predicted tokens."""
        key = (source, epoch)
        if key not in self._orders:
            tokens = self._row_tokens[source]
            rows = epoch_order(len(tokens), self.seed, self._names[source], epoch)
            self._orders[key] = (rows, tokens[rows])
            while len(self._orders) > 3 * len(self._names):
                self._orders.popitem(last=False)
        self._orders.move_to_end(key)
        return self._orders[key]

    def _check_epochs(self, step: int, position: Position) -> None:
        segment, _ = self._segment_at(step * self._global_batch_size)
        for name, limit in segment.max_epochs.items():
            source = self._names.index(name)
            epochs = position.drawn_rows[source] / max(len(self._row_tokens[source]), 1)
            if epochs > limit:
                raise DataError(
                    f"source '{name}': step {step} asks for epoch {epochs:.2f}, max_epochs is {limit:g}. Train fewer "
                    "steps, add data, lower its weight, or raise max_epochs."
                )


class _Cursor:
    """Token counts of one source's rows in the order in which they are drawn."""

    def __init__(self, mixture: Mixture, source: int, drawn: int) -> None:
        self._mixture = mixture
        self._source = source
        self._num_rows = len(mixture._row_tokens[source])
        self._next = drawn
        self._tokens: list[int] = []
        self._place = -1
        self.next_tokens = 0
        self.step()

    def step(self) -> None:
        """Go to the next row."""
        self._place += 1
        if self._place == len(self._tokens) and self._num_rows:
            # a stretch of the epoch as a list: indexing an array item by item is several times
            # slower
            epoch, place = divmod(self._next, self._num_rows)
            self._tokens = self._mixture._order(self._source, epoch)[1][
                place : place + _CURSOR_ROWS
            ].tolist()
            self._next += len(self._tokens)
            self._place = 0
        self.next_tokens = self._tokens[self._place] if self._num_rows else 0


def epoch_order(num_rows: int, seed: int, source_name: str, epoch: int) -> Integers:
    """Row numbers in the order of one epoch: sorted by splitmix64(row ^ key), key from (seed,
    source, epoch).
    """
    digest = hashlib.sha256(f"{seed}:{source_name}:{epoch}".encode()).digest()
    key = np.uint64(int.from_bytes(digest[:8], "little"))
    # splitmix64 is a bijection: no two keys are equal, so any sort gives the same order
    return np.argsort(splitmix64(np.arange(num_rows, dtype=np.uint64) ^ key)).astype(np.int64)

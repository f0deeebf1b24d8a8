"""(ledger, seed, step) -> the rows of a global batch.

    step -> index of its first row in the run -> nearest snapshot before it
    -> walk from there: choose a source for each row (WF2Q)
    -> its next row in the shuffled order of its epoch -> (source, row, epoch)

Choice of the source (WF2Q: Bennett and Zhang, INFOCOM 1996)
    Source i has weight w_i and has given e_i predicted tokens, all sources together E; its next row
    has l_i tokens. Among the sources that are not ahead of their share (e_i <= w_i E), the one
    whose next row is due first, at (e_i + l_i) / w_i tokens of the run, gives the row. At every
    prefix then
        -L <= w_i E - e_i <= L      where L is the largest row, at most seq_len.
    Picking the largest deficit is simpler, but lets a large source fall behind by more than a row
    while small ones catch up: 1.4 rows with weights .855, .093, .048, .004
    (tests/data_pipeline/mixture/test_mixture.py).

Linear changes
    In a phase that goes from weights a to b the target of source i after E tokens of the phase is
        W_i(E) = integral of w_i from 0 to E,   w_i(x) = a_i + (b_i - a_i) x / D,   b_i beyond D
    where D is the number of tokens that the rows of the phase hold on average, known before the
    first is drawn. So the change goes by tokens, and reaches b at the end of the phase as nearly as
    rows are equally full. A source is not ahead if e_i <= W_i(E), and its next row is due at the E
    at which W_i(E) = e_i + l_i: a root of a quadratic. With constant weights these are the rules
    above. The bound L holds for any weights >= 0 that sum to 1 at every E and are known in advance.
    Proof: rows are served by due time among those that the fluid schedule W has begun.
    Ahead: a row is begun only if e_i <= W_i, and W_i never falls, so e_i - W_i <= l_i <= L.
    Behind: let row k of source i be due at F. Before it begins, let r be the last row begun that
    is due after F (or none: then all rows before k are due by F, and fit into F). After r only
    rows due by F are taken; none of them had begun in W when r was taken, for it would have been
    taken instead. So W gives all of them within F, and k ends by F + (length of r) <= F + L.
    W_i grows by at most one token a token, and k has l_k of them, so W_i - e_i <= L when it begins.
    Some source is always not ahead, because the W_i sum to E.
    What decides is (e_i, l_i, E) in the segment, as before: pure in (ledger, seed, step).

Decisions
    Nothing here knows ranks, workers or accumulation: they slice what `global_batch` returns.
    Tokens are counted as labels, the ones that bear loss, so a row with padding counts for what it
    holds.
    Within a source every row comes once per epoch, in the order of a keyed hash of the row number.
    Weights change at the borders of segments. The token account starts anew there, but the place in
    each source goes on, so no row is lost or repeated.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import heapq
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from data_pipeline.errors import ConfigError, DataError
from data_pipeline.mixture.ledger import Ledger, Segment
from data_pipeline.store.hashing import splitmix64, splitmix64_inverse
from data_pipeline.store.packing import Integers

SNAPSHOT_ROWS = 1 << 14
"""Rows of the run between two snapshots; bounds the work of a step back."""
KEPT_EPOCHS = 3
"""Number of epochs per source, on average, whose orders stay in memory."""
_CURSOR_ROWS = 1 << 10
_BLOCK_ROWS = 1 << 20
"""Rows that are worked on at once, which bounds the memory."""
_MOST_INT32_ROWS = 2**31

RowNumbers: TypeAlias = npt.NDArray[np.signedinteger[Any]]
"""Numbers of rows or of their tokens, in 4 bytes each where they fit: every rank holds an order of
all rows.
"""


class RowCounts(Protocol):
    """The part of a build that the mixture needs to know."""

    source_names: tuple[str, ...]

    def row_tokens(self, source: int) -> RowNumbers:
        """Return the predicted tokens of each training row of a source."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GlobalBatch:
    """The rows of one optimizer step; B = global_batch_size."""

    step: int
    sources: Integers
    """Positions in `source_names`, [B]."""
    rows: Integers
    """Row numbers within the source, [B]."""
    predicted_tokens: Integers
    """Labels in each row, [B]."""
    epochs: Integers
    """How often the source was read to its end before, [B]."""

    def chain_hash(self, previous: str) -> str:
        """Return the hex sha256 over the hash of the step before ('' at step 0) and these rows."""
        digest = hashlib.sha256(f"{previous}:{self.step}:{len(self.rows)}:".encode())
        for values in (self.sources, self.rows, self.epochs):
            digest.update(values.astype("<i8").tobytes())
        return digest.hexdigest()


@dataclass(frozen=True, kw_only=True, slots=True)
class Position:
    """A place between two rows of the run, by what each source has given before it."""

    drawn_rows: tuple[int, ...]
    """Rows each source has given since step 0."""
    segment_tokens: tuple[int, ...]
    """Predicted tokens each source has given in the current segment."""


class Mixture:
    """The rows of every step, in whatever order the steps are asked for."""

    def __init__(self, built: RowCounts, ledger: Ledger, seed: int, *, first_step: int = 0) -> None:
        """Check the ledger against the build.

        Args:
            built: Gives the sizes of the rows.
            ledger: Weights over the run.
            seed: Decides the order of the rows within each source.
            first_step: Step at which drawing from these rows begins; none is asked for before it.

        Raises:
            ConfigError: the ledger names a source that is not built.
            DataError: a source has a weight but no rows.
        """
        self._names = built.source_names
        self._row_tokens = [built.row_tokens(source) for source in range(len(self._names))]
        self._ledger = ledger
        self.seed = seed
        self._first_step = first_step
        self._check_sources()
        self._orders = _EpochOrders(self._names, list(map(len, self._row_tokens)), seed)
        self._forget_snapshots(global_batch_size=0)

    def _check_sources(self) -> None:
        for segment in self._ledger.segments:
            for name, weight in _largest_weights(segment).items():
                if name not in self._names:
                    raise ConfigError(
                        f"mix ledger: source '{name}' is not in the build "
                        f"({', '.join(self._names)}). Build the mix that names it."
                    )
                if weight > 0 and not len(self._row_tokens[self._names.index(name)]):
                    raise DataError(
                        f"source '{name}' has weight {weight:g} but no training rows. Set its "
                        "weight to 0, or give it text to train on."
                    )

    def global_batch(self, step: int, global_batch_size: int) -> GlobalBatch:
        """Return the rows of one step.

        Raises:
            DataError: a source is asked for more epochs than its max_epochs.
        """
        first = step * global_batch_size
        position = self._position_at(first, global_batch_size)
        drawn: list[tuple[int, int]] = []
        position = self._walk(position, first, global_batch_size, drawn)
        self._latest = (first + global_batch_size, position)
        self._check_epochs(step, position)
        batch = np.empty((4, global_batch_size), dtype=np.int64)
        for index, (source, num_before) in enumerate(drawn):
            epoch, place = divmod(num_before, len(self._row_tokens[source]))
            row = self._orders.get(source, epoch)[place]
            batch[:, index] = source, row, self._row_tokens[source][row], epoch
        return GlobalBatch(
            step=step, sources=batch[0], rows=batch[1], predicted_tokens=batch[2], epochs=batch[3]
        )

    def position(self, step: int, global_batch_size: int) -> Position:
        """Return what was drawn before `step`.

        Epoch limits are not enforced here, so that a plan can list all that break.
        """
        return self._position_at(step * global_batch_size, global_batch_size)

    def epoch_tokens(self, source: int, epoch: int, num_rows: int) -> int:
        """Return the predicted tokens of the first rows that a source gives in an epoch."""
        order = self._orders.get(source, epoch)[:num_rows]
        total = 0
        for first in range(0, num_rows, _BLOCK_ROWS):
            rows = order[first : first + _BLOCK_ROWS]
            total += int(self._row_tokens[source][rows].sum(dtype=np.int64))
        return total

    def _origin(self) -> Position:
        zeros = (0,) * len(self._names)
        return Position(drawn_rows=zeros, segment_tokens=zeros)

    def _forget_snapshots(self, global_batch_size: int) -> None:
        # borders of segments are steps, so the batch size decides where they lie among the rows
        self._global_batch_size = global_batch_size
        first = self._first_step * global_batch_size
        self._snapshots = {first: self._origin()}
        self._snapshot_indices = [first]
        self._latest = (first, self._origin())
        self._phase_origins: dict[int, Position] = {}

    def _position_at(self, index: int, global_batch_size: int) -> Position:
        """Return the position before row `index` of the run."""
        assert index >= self._first_step * global_batch_size, "a step of an earlier stage"
        if global_batch_size != self._global_batch_size:
            self._forget_snapshots(global_batch_size)
        start = self._snapshot_indices[bisect.bisect_right(self._snapshot_indices, index) - 1]
        position = self._snapshots[start]
        if start < self._latest[0] <= index:
            start, position = self._latest
        while start < index:
            num_rows = min(index - start, SNAPSHOT_ROWS)
            position = self._walk(position, start, num_rows)
            start += num_rows
        self._latest = (index, position)
        return position

    def _walk(
        self,
        position: Position,
        index: int,
        num_rows: int,
        drawn: list[tuple[int, int]] | None = None,
    ) -> Position:
        """Draw rows from row `index` of the run on, and keep a snapshot if one is due.

        Args:
            position: The position before row `index`.
            index: Row of the run at which the walk begins.
            num_rows: Number of rows to draw.
            drawn: Takes (source, rows drawn from it before) for each row.

        Returns:
            The position after the rows.
        """
        stop = index + num_rows
        while index < stop:
            segment, segment_stop = self._segment_at(index)
            if index == segment.start_step * self._global_batch_size:
                zeros = self._origin().segment_tokens  # the segment has its own token account
                position = dataclasses.replace(position, segment_tokens=zeros)
            part_stop = min(stop, segment_stop)
            position = self._choose(position, segment, part_stop - index, drawn)
            index = part_stop
        if stop - self._snapshot_indices[-1] >= SNAPSHOT_ROWS:
            self._snapshots[stop] = position
            self._snapshot_indices.append(stop)
        return position

    def _segment_at(self, index: int) -> tuple[Segment, int]:
        """Return the segment of row `index`, and the row at which the next segment begins.

        For the last segment that row lies behind every run.
        """
        segments = self._ledger.segments
        starts = [segment.start_step * self._global_batch_size for segment in segments]
        number = bisect.bisect_right(starts, index) - 1
        starts.append(_BEHIND_EVERY_RUN)
        return segments[number], starts[number + 1]

    def _choose(
        self,
        position: Position,
        segment: Segment,
        num_rows: int,
        drawn: list[tuple[int, int]] | None,
    ) -> Position:
        """Choose sources by the rule in the module's docstring; arguments as in `_walk`."""
        drawn_rows = list(position.drawn_rows)
        given = list(position.segment_tokens)  # e
        total = sum(given)  # E
        target = self._target(segment)
        cursors = [self._cursor(source, num) for source, num in enumerate(drawn_rows)]
        # Ties go by name, so the order of the sources in the mix does not matter.
        by_name = sorted(target.sources, key=self._names.__getitem__)
        ranks = {source: rank for rank, source in enumerate(by_name)}
        reached_at = target.reached_at
        # without a change a division says it, and a call would take a third of the walk's time
        constant = target.constant_weights
        # (begins at, rank, source): sources that may be ahead of their share
        waiting = [(reached_at(source, given[source]), ranks[source], source) for source in by_name]
        heapq.heapify(waiting)
        # (due at, rank, source): sources that are not
        due: list[tuple[float, int, int]] = []
        for _ in range(num_rows):
            # Some source is always at or behind its share. Rounding may hide that; then the one
            # that is nearest to its share is taken.
            while waiting and (waiting[0][0] <= total or not due):
                _, rank, source = heapq.heappop(waiting)
                due_tokens = given[source] + cursors[source].next_tokens
                if constant is None:
                    due_at = reached_at(source, due_tokens)
                else:
                    due_at = due_tokens / constant[source]
                heapq.heappush(due, (due_at, rank, source))
            _, rank, source = heapq.heappop(due)
            if drawn is not None:
                drawn.append((source, drawn_rows[source]))
            total += cursors[source].next_tokens
            given[source] += cursors[source].next_tokens
            drawn_rows[source] += 1
            cursors[source].step()
            if constant is None:
                begins_at = reached_at(source, given[source])
            else:
                begins_at = given[source] / constant[source]
            heapq.heappush(waiting, (begins_at, rank, source))
        return Position(drawn_rows=tuple(drawn_rows), segment_tokens=tuple(given))

    def _cursor(self, source: int, num_drawn: int) -> _Cursor:
        return _Cursor(self._orders, source, self._row_tokens[source], num_drawn)

    def _target(self, segment: Segment) -> _Target:
        """Return the target of a segment, without the sources that it never draws from."""
        segment = segment.from_step(self._first_step)
        first = self._weights(segment.weights)
        if segment.to_weights is None or segment.stop_step is None:
            return _Target(first)
        last = self._weights(segment.to_weights)
        num_rows = (segment.stop_step - segment.start_step) * self._global_batch_size
        rows_per_token = []
        for source in first.keys() | last.keys():
            mean_weight = (first.get(source, 0.0) + last.get(source, 0.0)) / 2
            sizes = self._row_tokens[source]
            # whole numbers until the division, so the same on every machine
            rows_per_token.append(mean_weight * len(sizes) / int(sizes.sum()))
        return _ChangingTarget(first, last, num_rows / math.fsum(rows_per_token))

    def _weights(self, shares: Mapping[str, float]) -> dict[int, float]:
        """Return the weight of each source, scaled to sum to 1, without those of weight 0."""
        total = math.fsum(shares.values())
        weights = {}
        for name, weight in shares.items():
            if weight > 0:
                weights[self._names.index(name)] = weight / total
        return weights

    def _check_epochs(self, step: int, position: Position) -> None:
        segment, _ = self._segment_at(step * self._global_batch_size)
        self._check_phase_epochs(step, segment, position)
        for name, limit in segment.max_epochs.items():
            source = self._names.index(name)
            epochs = position.drawn_rows[source] / max(len(self._row_tokens[source]), 1)
            if epochs > limit:
                raise DataError(
                    f"source '{name}': step {step} asks for epoch {epochs:.2f}, max_epochs is "
                    f"{limit:g}. Train fewer steps, add data, lower its weight, or raise "
                    "max_epochs."
                )

    def _check_phase_epochs(self, step: int, segment: Segment, position: Position) -> None:
        ceilings = segment.phase_max_epochs()
        if not ceilings:
            return
        before = self._phase_origin(step).drawn_rows
        for name, limit in ceilings.items():
            source = self._names.index(name)
            drawn = position.drawn_rows[source] - before[source]
            epochs = drawn / max(len(self._row_tokens[source]), 1)
            if epochs > limit:
                raise DataError(
                    f"source '{name}': step {step} asks for epoch {epochs:.2f} within phase "
                    f"'{segment.phase}', whose max_epochs is {limit:g}. Shorten the phase, lower "
                    "the source's weight in it, add data, or raise "
                    f"schedule[{segment.phase}].max_epochs."
                )

    def _phase_origin(self, step: int) -> Position:
        """Return the position at which the phase of a step begins in these rows; kept."""
        first = max(self._ledger.phase_start(step), self._first_step)
        if first not in self._phase_origins:
            latest = self._latest
            self._phase_origins[first] = self.position(first, self._global_batch_size)
            self._latest = latest  # the next step goes on from there, and not from a snapshot
        return self._phase_origins[first]


_BEHIND_EVERY_RUN = 2**62


def _largest_weights(segment: Segment) -> dict[str, float]:
    """Return the largest weight that each source has in a segment."""
    largest = dict(segment.weights)
    for name, weight in (segment.to_weights or {}).items():
        largest[name] = max(weight, largest.get(name, 0.0))
    return largest


class _Target:
    """Tokens that each source should have given after E tokens of a segment, turned around."""

    def __init__(self, weights: Mapping[int, float]) -> None:
        self._weights = weights
        self.constant_weights: Mapping[int, float] | None = weights
        """Weight of each source; None if weights change."""
        self.sources = list(weights)
        """Sources that have a weight somewhere in the segment."""

    def reached_at(self, source: int, tokens: int) -> float:
        """Return the E at which the target of a source is `tokens`; infinite if it never is."""
        return tokens / self._weights[source]


class _ChangingTarget(_Target):
    """The target of a linear change; see the module's docstring."""

    def __init__(
        self, first: Mapping[int, float], last: Mapping[int, float], length: float
    ) -> None:
        """Prepare the targets of all sources.

        Args:
            first: Weights at the beginning, a.
            last: Weights at the end, b.
            length: Tokens of the change, D.
        """
        sources = sorted(first.keys() | last.keys())
        super().__init__(dict.fromkeys(sources, 0.0))
        self.constant_weights = None
        self._length = length
        self._ends: dict[int, tuple[float, float]] = {}
        for source in sources:
            self._ends[source] = (first.get(source, 0.0), last.get(source, 0.0))

    def reached_at(self, source: int, tokens: int) -> float:
        if not tokens:
            return 0.0
        first, last = self._ends[source]
        within = (first + last) / 2 * self._length  # W(D)
        if tokens > within:
            return self._length + (tokens - within) / last if last > 0 else math.inf
        slope = (last - first) / self._length
        # a E + slope E^2 / 2 = tokens; the form of the root that does not cancel
        root = math.sqrt(max(0.0, first * first + 2 * slope * tokens))
        return 2 * tokens / (first + root)


class _EpochOrders:
    """The orders in which the rows of each source come; the latest ones stay in memory."""

    def __init__(self, names: Sequence[str], num_rows: Sequence[int], seed: int) -> None:
        self._names = names
        self._num_rows = num_rows
        self._seed = seed
        self._kept: OrderedDict[tuple[int, int], RowNumbers] = OrderedDict()

    def get(self, source: int, epoch: int) -> RowNumbers:
        """Return the row numbers of a source in the order of an epoch."""
        key = (source, epoch)
        if key not in self._kept:
            name = self._names[source]
            self._kept[key] = epoch_order(self._num_rows[source], self._seed, name, epoch)
            while len(self._kept) > KEPT_EPOCHS * len(self._names):
                self._kept.popitem(last=False)
        self._kept.move_to_end(key)
        return self._kept[key]


class _Cursor:
    """The token counts of one source's rows, in the order in which they are drawn."""

    def __init__(
        self, orders: _EpochOrders, source: int, row_tokens: RowNumbers, num_drawn: int
    ) -> None:
        self._orders = orders
        self._source = source
        self._row_tokens = row_tokens
        self._num_rows = len(row_tokens)
        self._num_drawn = num_drawn
        self._tokens: list[int] = []
        self._place = -1
        self.next_tokens = 0
        self.step()

    def step(self) -> None:
        """Go to the next row; a source without rows has none, and no weight."""
        if not self._num_rows:
            return
        self._place += 1
        if self._place == len(self._tokens):
            # a stretch of the epoch as a list: indexing an array item by item is several times
            # slower
            epoch, place = divmod(self._num_drawn, self._num_rows)
            rows = self._orders.get(self._source, epoch)[place : place + _CURSOR_ROWS]
            self._tokens = self._row_tokens[rows].tolist()
            self._num_drawn += len(self._tokens)
            self._place = 0
        self.next_tokens = self._tokens[self._place]


def epoch_order(num_rows: int, seed: int, source_name: str, epoch: int) -> RowNumbers:
    """Return the row numbers of a source in the order of one epoch.

    They are sorted by splitmix64(row ^ key), with a key from (seed, source, epoch).
    """
    digest = hashlib.sha256(f"{seed}:{source_name}:{epoch}".encode()).digest()
    key = np.uint64(int.from_bytes(digest[:8], "little"))
    scattered = np.empty(num_rows, np.uint64)
    for first in range(0, num_rows, _BLOCK_ROWS):
        rows = np.arange(first, min(first + _BLOCK_ROWS, num_rows), dtype=np.uint64)
        scattered[first : first + len(rows)] = splitmix64(rows ^ key)
    # splitmix64 is a bijection: no two are equal, so any sort gives the same order, and the rows
    # follow from what was sorted. That needs half the memory of an argsort.
    scattered.sort()
    order: RowNumbers
    if num_rows <= _MOST_INT32_ROWS:
        order = np.empty(num_rows, np.int32)
    else:
        order = np.empty(num_rows, np.int64)
    for first in range(0, num_rows, _BLOCK_ROWS):
        block = scattered[first : first + _BLOCK_ROWS]
        order[first : first + len(block)] = splitmix64_inverse(block) ^ key
    return order

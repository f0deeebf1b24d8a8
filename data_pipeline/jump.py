"""A long way through the choice of sources, in many places at once.

    cumulative tokens of every source -> guess where each of many blocks starts -> walk all blocks
    side by side
                                                                                        |
                          exact positions <- does each block meet the next one? <-------+

Decisions
    The rule of `mixture` decides row by row, so one walk of a 10-billion-token run costs seconds in
    Python.  It also
    forgets: two walks that start a few rows apart are in the same state soon after.  Blocks
        therefore start from
    guesses, BURN_IN rows early, and are walked together with one numpy operation for all of them.
    A guess is never trusted: `Blocks.met` says which blocks reached exactly the state that the
    block before them ends in, and the caller walks the others row by row.  The result is that of
    the plain walk, bit for bit.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Integers = npt.NDArray[np.int64]

BURN_IN = 48
"""Rows after which blocks are expected to have met; a larger number only costs time."""
BLOCK_ROWS = 1024
"""Rows per block, about."""
MAX_BLOCKS = 4096
"""Blocks side by side; bounds the memory."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Blocks:
    """Walks over B consecutive stretches of a run; n sources."""

    index: Integers
    """[B + 1] rows of the run before each stretch, and after the last, counted from where the walk
    began.
    """
    first: Integers
    """[B, n] rows of each source drawn before each stretch: a guess, but for stretch 0."""
    last: Integers
    """[B, n] rows of each source drawn after each stretch, if `first` was right."""


def walk_blocks(
    cumulative: Sequence[Integers], weights: Sequence[float], count: int
) -> Blocks | None:
    """Walk nearly `count` rows of a run.

    Args:
        cumulative: per source, in the order in which ties are resolved: predicted tokens given so
            far, then after each further row; long enough for the whole walk.
        weights: share of each source.
        count: rows.

    Returns:
        Stretches that together end at or before `count`, or None if there is nothing to gain.
    """
    starts = _guess_starts(cumulative, weights, count)
    if len(starts) < 2:
        return None
    index = starts.sum(axis=1)
    steps = np.append(np.diff(index), 0) + BURN_IN
    walk = _Walk(cumulative, weights, starts)
    first, last = starts, starts.copy()
    for step in range(int(steps.max()) + 1):
        if step == BURN_IN:
            first = walk.drawn()
        ended = np.flatnonzero(steps == step)
        if len(ended):
            last[ended] = walk.drawn()[ended]
        walk.step()
    # the last block was walked for its burn-in alone: it marks where the one before it ends
    return Blocks(index=index + BURN_IN, first=first[:-1], last=last[:-1])


def _guess_starts(cumulative: Sequence[Integers], weights: Sequence[float], count: int) -> Integers:
    """[B, n] rows drawn at about evenly spaced places; row 0 is the true start."""
    total = int(sum(values[0] for values in cumulative))
    mean = sum(w * (v[-1] - v[0]) / (len(v) - 1) for v, w in zip(cumulative, weights, strict=True))
    num_blocks = min(max(count // BLOCK_ROWS, 1), MAX_BLOCKS)
    places = total + np.arange(1, num_blocks) * (count * mean / num_blocks)
    guesses = [
        np.searchsorted(v, w * places, side="left")
        for v, w in zip(cumulative, weights, strict=True)
    ]
    starts = np.stack(guesses, axis=1).astype(np.int64)
    usable = starts.sum(axis=1) + 2 * BURN_IN < count
    usable &= np.diff(starts.sum(axis=1), prepend=0) > 2 * BURN_IN
    origin = np.zeros((1, len(weights)), np.int64)
    return np.concatenate([origin, starts[: np.argmin(usable)] if not usable.all() else starts])


class _Walk:
    """B walks; all arrays are [B] or [B, n]."""

    def __init__(
        self, cumulative: Sequence[Integers], weights: Sequence[float], starts: Integers
    ) -> None:
        lengths = [len(values) for values in cumulative]
        self._offsets = np.cumsum([0, *lengths[:-1]])
        self._tokens = np.concatenate(cumulative)
        self._due = np.concatenate(
            [values / weight for values, weight in zip(cumulative, weights, strict=True)]
        )
        self._limits = np.array(lengths) + self._offsets - 2
        self._places = starts + self._offsets
        self._total = self._tokens[self._places].sum(axis=1)
        self._start_at = self._due[self._places]
        self._due_at = self._due[self._places + 1]
        self._walks = np.arange(len(starts))

    def drawn(self) -> Integers:
        """Rows drawn from each source."""
        return self._places - self._offsets

    def step(self) -> None:
        """One row in every walk, by the rule of `mixture`."""
        ready = self._start_at <= self._total[:, None]
        source = np.where(ready, self._due_at, np.inf).argmin(axis=1)
        stuck = ~ready.any(axis=1)
        if stuck.any():
            source[stuck] = self._start_at[stuck].argmin(axis=1)
        # a walk that is done goes on to be stepped; it stays on its last row at the end of a source
        place = np.minimum(self._places[self._walks, source] + 1, self._limits[source])
        self._places[self._walks, source] = place
        self._start_at[self._walks, source] = self._due_at[self._walks, source]
        self._due_at[self._walks, source] = self._due[place + 1]
        self._total += self._tokens[place] - self._tokens[place - 1]

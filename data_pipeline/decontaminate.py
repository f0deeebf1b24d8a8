"""Training documents that hold a piece of a held-out document.

Decisions
    A run of `length` equal tokens counts (Lee et al., arXiv 2107.06499, use 50): a short held-out text inside a long
    document is found, a common phrase is not.
    All runs of the held-out documents are kept as sorted 64-bit hashes, with a bitmap before them that turns nearly all
    runs of the training documents away.  Held-out sets are small; their size bounds the memory.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable

import numpy as np
import numpy.typing as npt

from data_pipeline.near import window_hashes
from data_pipeline.tokenizer import Tokens

_BITMAP_BITS = 24


@dataclasses.dataclass(frozen=True, slots=True)
class HeldOutRuns:
    """All runs of tokens in the held-out documents."""

    length: int
    """Tokens in a run."""
    hashes: npt.NDArray[np.uint64]
    """Sorted, each once."""
    bitmap: npt.NDArray[np.bool_]
    """By the leading bits of a hash: whether any run has them."""

    @classmethod
    def of(cls, documents: Iterable[Tokens], length: int) -> HeldOutRuns:
        """Runs of `documents`."""
        parts = [window_hashes(tokens, length) for tokens in documents]
        return cls.from_hashes(np.unique(np.concatenate([np.zeros(0, np.uint64), *parts])), length)

    @classmethod
    def from_hashes(cls, hashes: npt.NDArray[np.uint64], length: int) -> HeldOutRuns:
        """From `hashes` of a set made before."""
        bitmap = np.zeros(1 << _BITMAP_BITS, dtype=bool)
        bitmap[_leading(hashes)] = True
        return cls(length, hashes, bitmap)

    def meets(self, tokens: Tokens) -> npt.NDArray[np.bool_]:
        """For each run of `tokens` whether a held-out document has it, too."""
        windows = window_hashes(tokens, self.length)
        found = self.bitmap[_leading(windows)]
        candidates = np.flatnonzero(found)
        if len(candidates):
            places = np.searchsorted(self.hashes, windows[candidates])
            places = np.minimum(places, len(self.hashes) - 1)
            found[candidates] = self.hashes[places] == windows[candidates]
        return found


def contaminated(tokens: Tokens, offsets: npt.NDArray[np.int64], runs: HeldOutRuns) -> npt.NDArray[np.bool_]:
    """For each document of a shard whether it shares a run with a held-out document.

    Args:
        tokens: of all documents; END_OF_TEXT after each keeps runs from spanning two.
        offsets: first token of each document, and the end.
        runs: of the held-out documents, which hold no END_OF_TEXT.
    """
    result = np.zeros(len(offsets) - 1, dtype=bool)
    if not len(runs.hashes):
        return result
    block = 1 << 22
    for start in range(0, len(tokens), block):
        hits = np.flatnonzero(runs.meets(tokens[start : start + block + runs.length - 1])) + start
        if len(hits):
            result[np.unique(np.searchsorted(offsets, hits, side="right") - 1)] = True
    return result


def _leading(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    return (hashes >> np.uint64(64 - _BITMAP_BITS)).astype(np.int64)

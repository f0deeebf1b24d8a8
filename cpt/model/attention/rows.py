"""The documents of a micro batch's packed rows, described by offsets.

Decisions
    - Documents are intervals of the flattened tokens, never a mask, so a description is as small as
      the number of documents.
    - The start of a row is always the start of a document: rows need no further treatment anywhere.
      A padding tail is one more document, or many.
    - Whatever a kernel computes from the description alone (masks, offsets on a device) is kept
      here and lives as long as the batch: the first layer computes it and the others read it.

Shape letters: B rows, T tokens of a row, N = B * T tokens of the micro batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar, cast

import torch

from cpt.storage.transfer import to_device

Derived = TypeVar("Derived")


@dataclass(frozen=True, kw_only=True, slots=True)
class PackedRows:
    """The documents of `batch_size` rows of `seq_len` tokens, flattened row after row.

    Raises:
        ValueError: `bounds` do not describe such rows.
    """

    batch_size: int
    """Number of rows."""
    seq_len: int
    """Tokens of each row."""
    bounds: tuple[int, ...]
    """Offsets of the documents in the flattened tokens, every row start among them, and the end."""
    _derived: dict[Hashable, Any] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.seq_len < 1:
            raise ValueError(
                f"packed rows need tokens, got batch_size={self.batch_size} and "
                f"seq_len={self.seq_len}."
            )
        if self.bounds[:1] != (0,) or self.bounds[-1] != self.num_tokens:
            raise ValueError(
                f"document bounds must run from 0 to {self.num_tokens} ({self.batch_size} rows of "
                f"{self.seq_len} tokens), got {_shortened(self.bounds)}."
            )
        for start, end in itertools.pairwise(self.bounds):
            if end <= start:
                raise ValueError(
                    f"document bounds must grow, but {start} is followed by {end}. No document is "
                    "empty."
                )
        row_starts = range(0, self.num_tokens, self.seq_len)
        missing = sorted(set(row_starts).difference(self.bounds))
        if missing:
            raise ValueError(
                f"no document starts at token {missing[0]}, the start of row "
                f"{missing[0] // self.seq_len}. A document cannot run from one row into the next: "
                "cut it there."
            )

    @classmethod
    def from_position_ids(cls, position_ids_BT: torch.Tensor) -> PackedRows:
        """Start a document at each row and where a position is not its predecessor plus one.

        This reads the tensor once; on a GPU that is one synchronization per call.
        """
        if position_ids_BT.ndim != 2:
            raise ValueError(
                f"position_ids must have shape (rows, tokens), got {tuple(position_ids_BT.shape)}."
            )
        starts_BT = torch.ones_like(position_ids_BT, dtype=torch.bool)
        starts_BT[:, 1:] = position_ids_BT[:, 1:] != position_ids_BT[:, :-1] + 1
        starts = starts_BT.flatten().nonzero().flatten().tolist()
        batch_size, seq_len = position_ids_BT.shape
        return cls(batch_size=batch_size, seq_len=seq_len, bounds=(*starts, batch_size * seq_len))

    @classmethod
    def from_bounds(cls, bounds_per_row: Sequence[Sequence[int]], seq_len: int) -> PackedRows:
        """Take, for each row, the offsets of its documents within the row.

        They run from 0 to `seq_len`, both included.
        """
        flat: list[int] = []
        for row, bounds in enumerate(bounds_per_row):
            if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != seq_len:
                raise ValueError(
                    f"bounds of row {row} must run from 0 to seq_len={seq_len}, got "
                    f"{_shortened(bounds)}. Give a padding tail as a document of its own."
                )
            flat += [row * seq_len + offset for offset in bounds[:-1]]
        num_rows = len(bounds_per_row)
        return cls(batch_size=num_rows, seq_len=seq_len, bounds=(*flat, num_rows * seq_len))

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows together."""
        return self.batch_size * self.seq_len

    @property
    def longest_document_tokens(self) -> int:
        """Tokens of the longest document."""
        return max(end - start for start, end in itertools.pairwise(self.bounds))

    def document_ids(self, device: torch.device) -> torch.Tensor:
        """Return the number of the document of each token, shape (N,), counted over all rows."""

        def build() -> torch.Tensor:
            lengths = torch.tensor(self.bounds).diff()
            return to_device(torch.arange(len(lengths)).repeat_interleave(lengths), device)

        return self.derive(("document_ids", device), build)

    def derive(self, key: Hashable, build: Callable[[], Derived]) -> Derived:
        """Return what `build` returned at the first call with this key.

        `build` must depend on the key and on this description only, and its result must not be
        changed in place.
        """
        if key not in self._derived:
            self._derived[key] = build()
        return cast(Derived, self._derived[key])


def _shortened(offsets: Sequence[int]) -> str:
    shown = [str(offset) for offset in offsets]
    if len(shown) > 8:
        shown = [*shown[:4], "...", *shown[-3:]]
    return f"[{', '.join(shown)}]"

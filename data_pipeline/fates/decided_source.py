"""One source, and what becomes of its documents."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from data_pipeline.fates.deduplication import SourceFates
from data_pipeline.parts.source_parts import SourceParts
from data_pipeline.store.packing import Integers, Segments

Mask = npt.NDArray[np.bool_]


def no_segments() -> Segments:
    """Return the segments of no document."""
    none = np.zeros(0, np.int64)
    return Segments(document=none, start=none, tokens=none)


@dataclass(frozen=True, kw_only=True, slots=True)
class DecidedSource:
    """One source, and what becomes of its documents."""

    parts: SourceParts
    fates: SourceFates
    held_out_hash: str
    """Hex sha256 of the content hashes of its held-out documents."""
    held_out_found: Mask
    """For each held-out document, whether training text had a copy or a long run of it."""
    near_copies_of: tuple[int, ...] = ()
    """Near copies that were dropped, by the source of their original; empty if none was sought."""
    left: Segments = field(default_factory=no_segments)
    """What is trained on of documents that lost a stretch, in the order of documents."""
    held_out_unsearched: int = 0
    """Held-out documents that are too short to be searched for in training text."""
    contaminated_by: Mapping[str, int] = field(default_factory=dict)
    """Documents dropped for text of each source that holds it out; one that was cut is no such."""
    exempted_documents: int = 0
    """Training documents that have stock text which is held out, too."""
    exempted_tokens: int = 0
    """Tokens of that text in them."""

    @property
    def is_only_measured(self) -> bool:
        """Whether the source is a guard file, or held out as a whole."""
        return self.parts.source.held_out_share >= 1

    def training_segments(self, document_tokens: Integers) -> Segments:
        """Return what is trained on, in the order of documents.

        Args:
            document_tokens: Tokens of each stored document, END_OF_TEXT included.
        """
        train = self.fates.train
        if not len(self.left):
            return Segments.whole(train, document_tokens[train])
        uncut = train[~np.isin(train, self.left.document)]
        document = np.concatenate([uncut, self.left.document])
        start = np.concatenate([np.zeros_like(uncut), self.left.start])
        tokens = np.concatenate([document_tokens[uncut], self.left.tokens])
        order = np.argsort(document, kind="stable")
        return Segments(document=document[order], start=start[order], tokens=tokens[order])

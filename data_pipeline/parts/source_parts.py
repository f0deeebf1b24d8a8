"""All parts of one source, added up once they are made."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.config.source_config import SourceConfig
from data_pipeline.errors import DataError
from data_pipeline.parts.part import (
    Account,
    Part,
    read_account,
    read_clusters,
    read_copy_hashes,
    read_hashes,
    read_records,
)
from data_pipeline.reading.content_hashes import HASH_DTYPE, Hashes
from data_pipeline.reading.sources import TOO_LONG
from data_pipeline.store.hashing import Hashes64
from data_pipeline.store.packing import Integers
from data_pipeline.store.shards import Shards
from data_pipeline.text.cleaning import Tally
from data_pipeline.text.conversation_reader import NO_ANALYSIS, NO_TOOLS
from data_pipeline.text.harmony_records import NO_MESSAGES, NO_RESULT, OLD_CALLS, PARTS
from data_pipeline.text.record_keys import UNKNOWN_KEY
from data_pipeline.text.record_shapes import CONTRADICTION

_CURES = {
    UNKNOWN_KEY: "List keys that may be dropped in ignored_keys of the source.",
    TOO_LONG: "Longer conversations need a larger seq_len.",
    NO_MESSAGES: "Records in the shape of another tool need the shape of the source to name it.",
    NO_TOOLS: "Give the record the definitions of its functions, or learn it with loss: all.",
    PARTS: "Set shape: openai.",
    OLD_CALLS: "shape: openai reads function_call.",
    NO_ANALYSIS: (
        "Answers without analysis are learned without require_analysis; give them "
        "reasoning_effort: low."
    ),
    CONTRADICTION: "Where loss is right, drop the other with ignored_keys: [weight].",
    NO_RESULT: "A call needs its result next, or has to be the end of the conversation.",
}
"""What can be done about rejects, by the beginning of their reason."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceParts:
    """The tokenized documents of one source."""

    source: SourceConfig
    parts: Sequence[Part]
    """Parts that have documents."""
    accounts: Sequence[Account]
    """Account of each of those parts."""
    lines_before: Sequence[int]
    """Lines of the same file before each of those parts; 0 in files without lines."""
    tally: Tally
    """Counts of all documents of the source, by what became of them."""
    num_duplicates: int
    """Copies that were left out of the shards."""
    num_duplicate_tokens: int
    """Tokens of those copies."""

    @classmethod
    def gather(cls, source: SourceConfig, parts: Sequence[Part]) -> SourceParts:
        """Add up the accounts of a source; `parts` are all of its parts, made."""
        tally = Tally()
        lines_before = 0
        previous_paths = None
        num_duplicates = 0
        num_duplicate_tokens = 0
        full_parts = []
        full_accounts = []
        full_lines_before = []
        for part in parts:
            account = read_account(part)
            assert account is not None, f"{part.account_path}: parts are made before this"
            if part.unit.paths != previous_paths:
                lines_before = 0
            previous_paths = part.unit.paths
            tally.add(account.tally, lines_before)
            num_duplicates += account.num_duplicates
            num_duplicate_tokens += account.num_duplicate_tokens
            if account.num_documents:
                full_lines_before.append(lines_before)
                full_parts.append(part)
                full_accounts.append(account)
            lines_before += account.tally.lines
        return cls(
            source=source,
            parts=full_parts,
            accounts=full_accounts,
            lines_before=full_lines_before,
            tally=tally,
            num_duplicates=num_duplicates,
            num_duplicate_tokens=num_duplicate_tokens,
        )

    @property
    def is_mock(self) -> bool:
        """Whether the documents are invented, and stand for no text."""
        return self.source.format == "mock"

    def check_rejects(self, max_reject_share: float) -> None:
        """Refuse a source that has too many unusable documents, or none that can be used.

        Raises:
            DataError: more than `max_reject_share` of the documents were rejected, or all were.
        """
        name = self.source.name
        if self.tally.reject_share > max_reject_share:
            rejected = self.tally.rejects.total()
            raise DataError(
                f"source '{name}': {rejected} of {rejected + self.tally.accepted} documents cannot "
                f"be used, more than max_reject_share {max_reject_share:g}: "
                f"{self.tally.describe_rejects()}. {self._advice()}"
            )
        if not self.parts and self.tally.filtered:
            conditions = []
            for condition, count in self.tally.filtered.most_common():
                conditions.append(f"{count} {condition}")
            raise DataError(
                f"source '{name}': its filters leave no document: {'; '.join(conditions)}. "
                "Correct the names of the fields, or loosen the filters."
            )
        if not self.parts:
            raise DataError(
                f"source '{name}': its files hold no documents. Remove the source, or check its "
                "path and text_field."
            )

    def _advice(self) -> str:
        """Return what can be done about the rejects."""
        advice = "Repair the files, or raise max_reject_share."
        for beginning, cure in _CURES.items():
            if any(reason.startswith(beginning) for reason in self.tally.rejects):
                advice += f" {cure}"
        return advice

    def hashes_of(self, documents: Integers) -> Hashes:
        """Return the content hashes of documents, whose numbers rise."""
        return self._of_documents(documents, read_hashes, HASH_DTYPE)

    def copy_hashes_of(self, documents: Integers) -> Hashes:
        """Return the hashes that documents, whose numbers rise, share with their exact copies."""
        return self._of_documents(documents, read_copy_hashes, HASH_DTYPE)

    @property
    def has_clusters(self) -> bool:
        """Whether documents may belong together: the source says which, or they are turns."""
        return self.source.cluster_by is not None or any(part.by_record for part in self.parts)

    def clusters_of(self, documents: Integers) -> Hashes64:
        """Return the clusters of documents, whose numbers rise, of a source that has some.

        Turns of one record are a cluster, unless `cluster_by` makes larger ones of whole files.
        """
        if self.source.cluster_by is not None:
            return self._of_documents(documents, read_clusters, np.uint64)
        records: Hashes = self._of_documents(documents, read_records, HASH_DTYPE)
        return records["low"]

    def _of_documents(
        self, documents: Integers, read: Callable[[Part], Any], dtype: npt.DTypeLike
    ) -> Any:
        """Return what a side file of the parts holds of documents, whose numbers rise."""
        chosen = [np.zeros(0, dtype)]
        for part, numbers in self._by_part(documents):
            chosen.append(read(part)[numbers])
        return np.concatenate(chosen)

    def _by_part(self, documents: Integers) -> Iterator[tuple[Part, Integers]]:
        """Yield the parts that hold some of the documents, and their numbers within the part."""
        first = 0
        for part, account in zip(self.parts, self.accounts, strict=True):
            stop = first + account.num_documents
            begin, end = np.searchsorted(documents, [first, stop])
            if begin < end:
                yield part, documents[begin:end] - first
            first = stop

    def open_shards(self) -> Shards:
        """Return all documents; they are read by position."""
        paths = [part.shard_path for part in self.parts]
        return Shards(paths[0].parent, [path.name for path in paths], verify=False)

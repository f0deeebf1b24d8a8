"""What a build did not take, in documents and tokens, and that nothing was lost without a reason.

    read = trained on + held out + dropped, by reason, for documents and for tokens

Decisions
    Every reason has a count of documents and one of tokens, for every source. Of what was rejected
    or filtered before it was tokenized nobody knows the tokens; it is not part of `read`.
    A sum that does not add up is a bug of this package and stops the build.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from data_pipeline.escaping import escaped_line
from data_pipeline.fates.decided_source import DecidedSource
from data_pipeline.fates.deduplication import Fate
from data_pipeline.store.manifest import SourceEntry, StockText
from data_pipeline.store.packing import Integers, Segments
from data_pipeline.tables import table

Counts = dict[str, dict[str, int]]

COPIES = "exact copies"
NEAR_COPIES = "near copies"
HELD_OUT_COPIES = "copies of held-out text"
CONTAMINATED = "held-out text in it"
STRETCHES = "stretches of held-out text"
STOCK_TEXT = "stock text"
_REASON_OF_FATE = {
    Fate.DUPLICATE: COPIES,
    Fate.NEAR_DUPLICATE: NEAR_COPIES,
    Fate.HELD_OUT_COPY: HELD_OUT_COPIES,
    Fate.CONTAMINATED: CONTAMINATED,
}
_FILTERED = "filtered: "
_UNKNOWN = "unknown"
DROPPED_COLUMNS = ("source", "dropped", "documents", "tokens", "share of tokens")


def count_read(source: DecidedSource) -> tuple[int, int]:
    """Return (documents, tokens) of a source that could be used."""
    parts = source.parts
    documents = parts.num_duplicates
    tokens = parts.num_duplicate_tokens
    for account in parts.accounts:
        documents += account.num_documents
        tokens += account.num_tokens
    for condition, num_tokens in parts.tally.filtered_tokens.items():
        documents += parts.tally.filtered[condition]
        tokens += num_tokens
    return documents, tokens


def count_dropped(source: DecidedSource, document_tokens: Integers, trained: Segments) -> Counts:
    """Return what was dropped of a source, by reason.

    Args:
        source: The source and the fates of its documents.
        document_tokens: Tokens of each stored document, END_OF_TEXT included.
        trained: What is trained on.

    Raises:
        AssertionError: what was read is not what is trained on, held out and dropped, together.
    """
    fates = source.fates.fates
    documents_by_fate = np.bincount(fates, minlength=len(Fate))
    tokens_by_fate = np.zeros(len(Fate), np.int64)
    np.add.at(tokens_by_fate, fates, document_tokens)
    dropped: Counts = {}
    for fate, reason in _REASON_OF_FATE.items():
        dropped[reason] = {
            "documents": int(documents_by_fate[fate]),
            "tokens": int(tokens_by_fate[fate]),
        }
    dropped[COPIES]["documents"] += source.parts.num_duplicates
    dropped[COPIES]["tokens"] += source.parts.num_duplicate_tokens
    num_trained_tokens = int(trained.tokens.sum())
    dropped[STRETCHES] = {
        "documents": 0,
        "tokens": int(tokens_by_fate[Fate.TRAIN]) - num_trained_tokens,
        "cut_documents": len(np.unique(source.left.document)),
    }
    tally = source.parts.tally
    for condition, num_tokens in sorted(tally.filtered_tokens.items()):
        counts = {"documents": tally.filtered[condition], "tokens": num_tokens}
        dropped[_FILTERED + condition] = counts
    used = (
        int(documents_by_fate[Fate.TRAIN] + documents_by_fate[Fate.HELD_OUT]),
        num_trained_tokens + int(tokens_by_fate[Fate.HELD_OUT]),
    )
    _check_sum(source, used, dropped)
    for condition, documents in sorted(tally.filtered.items()):
        dropped.setdefault(_FILTERED + condition, {"documents": documents})
    for reason, documents in sorted(tally.rejects.items()):
        dropped[reason] = {"documents": documents}
    return {reason: counts for reason, counts in dropped.items() if any(counts.values())}


def _check_sum(source: DecidedSource, used: tuple[int, int], dropped: Counts) -> None:
    documents, tokens = used
    for counts in dropped.values():
        assert counts["tokens"] >= 0, f"{source.parts.source.name}: {dropped}"
        documents += counts["documents"]
        tokens += counts["tokens"]
    assert (documents, tokens) == count_read(source), (
        f"source '{source.parts.source.name}': {count_read(source)} documents and tokens were "
        f"read, {documents} and {tokens} are accounted for ({dropped})"
    )


def count_exempted(source: DecidedSource) -> Counts:
    """Return what stays of a source against a rule, by the reason why."""
    if not source.exempted_documents:
        return {}
    counts = {"documents": source.exempted_documents, "tokens": source.exempted_tokens}
    return {STOCK_TEXT: counts}


def describe_dropped(entries: Sequence[SourceEntry]) -> str:
    """Return a table of what was dropped, and of what stays against a rule; empty if nothing is."""
    rows = dropped_rows(entries)
    return table(DROPPED_COLUMNS, rows) if rows else ""


def dropped_rows(entries: Sequence[SourceEntry]) -> list[tuple[str, ...]]:
    """Return the rows of that table, in the columns DROPPED_COLUMNS."""
    rows = []
    for entry in entries:
        for reason, counts in entry.dropped.items():
            rows.append(_row(entry, reason, counts))
        for reason, counts in entry.exempted.items():
            rows.append(_row(entry, f"kept all the same: {reason}", counts))
    return rows


def describe_stock_text(listed: Sequence[StockText]) -> str:
    """Return the held-out text that was let through, with documents that have it; may be empty."""
    lines = []
    for stock in listed:
        lines.append(
            f"stock text, let through: {stock.documents:,} training documents have a run of these "
            f"{stock.tokens:,} tokens, which '{stock.held_out_by}' holds out:"
        )
        lines.append(f"    {escaped_line(stock.text)}")
        for example in stock.examples:
            lines.append(f"    in {escaped_line(example)}")
    return "\n".join(lines)


def _row(entry: SourceEntry, reason: str, counts: Mapping[str, int]) -> tuple[str, ...]:
    documents = f"{counts['documents']:,}"
    if "cut_documents" in counts:
        reason += f", cut out of {counts['cut_documents']:,} documents"
    if "tokens" not in counts:
        return entry.name, reason, documents, _UNKNOWN, ""
    share = counts["tokens"] / max(entry.read_tokens, 1)
    return entry.name, reason, documents, f"{counts['tokens']:,}", f"{share:.3%}"

"""A look at the text itself: is each source what its label says, and in what state is it?

    documents of a source -> language, damage, lengths, tokens, copies -> figures per source
    -> table and page (audit.page)

Decisions
    The input is read as `build` reads it, but nothing is written. Up to `limit` documents of each
    source are taken, spread evenly over its units, so a large source costs no more than a small
    one.
    Only a wrong language fails an audit; the other figures need a person's judgment.
    Damage by normalization is what NFKC, which people often apply without looking, would do to a
    source. It is shown whether or not the mix asks for NFKC.
    Tokens are those that a row would hold, but for the one that ends a text. Of each source of
    conversations one is shown with its learned tokens marked: the one that has most to look at.
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_pipeline.audit.shown_conversation import (
    ShownConversation,
    learned_tokens,
    show_conversation,
    tells_more,
)
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.source_config import SourceConfig
from data_pipeline.console.progress import show_progress
from data_pipeline.engine.local import LocalExecutor
from data_pipeline.reading.document import Document
from data_pipeline.reading.sources import read_documents, why_too_long
from data_pipeline.reading.units import split_into_units
from data_pipeline.tables import table
from data_pipeline.text.cleaning import Tally, compose_compatible
from data_pipeline.text.language import UNTESTABLE, language_of
from data_pipeline.text.tokenizer import encode

DEFAULT_LIMIT = 20_000
"""Number of documents per source."""
LENGTH_EDGES = tuple(2**power for power in range(4, 22))
"""Lower edges of the length histogram, in characters."""
MAX_EXAMPLES = 5
EXAMPLE_CHARACTERS = 160
_MOJIBAKE = re.compile(
    "\ufffd|[\u00c2\u00c3][\u0080-\u00bf]|\u00e3\u0081|\u00e3\u0082|\u00e2\u20ac|"
    "[\u7e3a\u7e67\u7e5d][\uff61-\uff9f\u3000-\u30ff\u4e00-\u9fff]|\u6587\u5b57\u5316\u3051\u8a66"
)
"""Matches replacement characters, and UTF-8 read as Latin-1, Windows-1252 or Shift-JIS."""
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")
_LOST_BY_NFKC = re.compile(
    "[\u00b2\u00b3\u00b9\u2070-\u209c\u00bc-\u00be\u2150-\u215e\u3300-\u33ff\u32c0-\u32fe]"
)
"""Matches raised and lowered digits, fractions and squared words: NFKC takes their meaning."""


@dataclass(kw_only=True, slots=True)
class SourceAudit:
    """Figures of one source."""

    name: str
    language: str
    """Label of the source in the mix."""
    documents: int = 0
    """Documents looked at."""
    judged: int = 0
    """Documents whose language can be told."""
    mislabelled: int = 0
    """Documents in another language than the label."""
    languages: Counter[str] = field(default_factory=Counter)
    """Documents by the language found."""
    examples: list[str] = field(default_factory=list)
    """Beginnings of the first few mislabelled documents."""
    mojibake: int = 0
    """Documents with characters of a wrong decoding."""
    control: int = 0
    """Documents with control characters."""
    duplicates: int = 0
    """Documents that were seen before in the source."""
    characters: int = 0
    bytes: int = 0
    tokens: int = 0
    """Tokens of the texts alone, for their fertility."""
    document_tokens: int = 0
    """Tokens of the documents: of conversations those of the format, too."""
    learned_tokens: int = 0
    """Those of them that bear loss as labels."""
    rejects: Counter[str] = field(default_factory=Counter)
    """Documents that a build could not use, by the reason."""
    conversation: ShownConversation | None = None
    """A conversation of the source, to look at what is learned; None if it has none."""
    nfkc_changed: int = 0
    """Documents that NFKC would change."""
    nfkc_damaged: int = 0
    """Documents in which NFKC would destroy a meaning, such as x squared or one half."""
    notes: Counter[str] = field(default_factory=Counter)
    """Documents that the mix's own normalization changed, and oddities of the files, by kind."""
    lengths: list[int] = field(default_factory=lambda: [0] * len(LENGTH_EDGES))
    """Documents by length, in the columns of LENGTH_EDGES."""

    @property
    def rejected(self) -> int:
        """Documents that a build could not use."""
        return self.rejects.total()

    @property
    def mislabelled_share(self) -> float:
        """Mislabelled documents among those that can be judged, 0 to 1."""
        return self.mislabelled / max(self.judged, 1)

    @property
    def tokens_per_character(self) -> float:
        """The fertility of the tokenizer on this source."""
        return self.tokens / max(self.characters, 1)

    def describe_rejects(self) -> str:
        """Return the reasons why documents cannot be used, with their counts."""
        reasons = sorted(self.rejects.items(), key=lambda item: (-item[1], item[0]))
        return "; ".join(f"{count:,} {reason}" for reason, count in reasons)

    def to_json(self) -> dict[str, Any]:
        """Return the figures as JSON values."""
        counts = {"languages": self.languages, "notes": self.notes, "rejects": self.rejects}
        value = dataclasses.asdict(
            dataclasses.replace(self, languages=Counter(), notes=Counter(), rejects=Counter())
        )
        for name, counter in counts.items():
            value[name] = dict(counter)
        value["rejected"] = self.rejected
        value["mislabelled_share"] = self.mislabelled_share
        value["tokens_per_character"] = self.tokens_per_character
        return value

    def add(self, text: str) -> None:
        """Add one document to the figures."""
        self._add_language(text)
        self.mojibake += _MOJIBAKE.search(text) is not None
        self.control += _CONTROL.search(text) is not None
        if not text.isascii():
            self.nfkc_changed += compose_compatible(text) != text
            self.nfkc_damaged += _LOST_BY_NFKC.search(text) is not None
        self.characters += len(text)
        self.bytes += len(text.encode("utf-8"))
        column = len(text).bit_length() - LENGTH_EDGES[0].bit_length()
        self.lengths[max(min(column, len(LENGTH_EDGES) - 1), 0)] += 1

    def add_tokens(self, document: Document, seq_len: int, unit_start: int) -> bool:
        """Add the tokens of one document, and show it if it is a conversation that tells more.

        Args:
            document: The document.
            seq_len: Pairs of input and label of the longest conversation that is used.
            unit_start: Where the unit that the document was read from begins in its file.

        Returns:
            Whether it is used: a conversation that is too long for a row is counted as a reject.
        """
        if not document.is_conversation:
            num_tokens = len(encode(document.text))
            self.document_tokens += num_tokens
            self.learned_tokens += num_tokens
            self.tokens += num_tokens
            return True
        tokens, learned = learned_tokens(document)
        if len(tokens) - 1 > seq_len:
            self.rejects[why_too_long(seq_len)] += 1
            return False
        self.tokens += len(encode(document.text))
        self.document_tokens += len(tokens)
        self.learned_tokens += int(np.count_nonzero(learned))
        if not unit_start:  # lines of other units are counted from within the file
            shown = show_conversation(document, tokens, learned)
            if tells_more(shown, self.conversation):
                self.conversation = shown
        return True

    def _add_language(self, text: str) -> None:
        if self.language in UNTESTABLE:
            return
        found = language_of(text)
        if found is None:
            return
        self.judged += 1
        self.languages[found] += 1
        if found != self.language:
            self.mislabelled += 1
            if len(self.examples) < MAX_EXAMPLES:
                beginning = " ".join(text[:EXAMPLE_CHARACTERS].split())
                self.examples.append(f"[{found}] {beginning}")


@dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """Figures of a whole mix."""

    mix: str
    """Name of the mix."""
    max_mislabelled_share: float
    """Share of mislabelled documents above which a source fails, 0 to 1."""
    sources: tuple[SourceAudit, ...]

    def problems(self) -> list[str]:
        """Return a problem for each source that is not what its label says."""
        problems = []
        for source in self.sources:
            if source.mislabelled_share > self.max_mislabelled_share:
                problems.append(
                    f"source '{source.name}': {source.mislabelled} of {source.judged} documents "
                    f"({source.mislabelled_share:.1%}) are not in '{source.language}' but in "
                    f"{_other_languages(source)}, more than max_mislabelled_share "
                    f"{self.max_mislabelled_share:g}. Split the source, filter it, or correct its "
                    "language."
                )
        return problems

    def describe(self) -> str:
        """Return a table for people, and below it what cannot be used, by source and reason."""
        text = table(_COLUMNS, [_table_row(source) for source in self.sources])
        for source in self.sources:
            if source.rejects:
                text += f"\n{source.name}: {source.describe_rejects()}"
        return text


def audit(mix: MixConfig, limit: int = DEFAULT_LIMIT, workers: int = 1) -> Audit:
    """Look at up to `limit` documents of each source that holds text.

    Raises:
        DataError: the input cannot be read.
    """
    jobs = []
    for source in mix.sources:
        if source.format != "mock":
            jobs.append((source, limit, mix.longest_conversation(source)))
    found = {}
    bar = show_progress(len(jobs), "audit", "source")
    with bar, LocalExecutor(workers) as executor:
        for (source, _, _), result in executor.run(_audit_source, jobs):
            found[source.name] = result
            bar.update()
    sources = tuple(found[source.name] for source, _, _ in jobs)
    return Audit(mix=mix.name, max_mislabelled_share=mix.max_mislabelled_share, sources=sources)


def _audit_source(job: tuple[SourceConfig, int, int]) -> SourceAudit:
    source, limit, seq_len = job
    result = SourceAudit(name=source.name, language=source.language)
    seen: set[int] = set()
    for document, unit_start in _some_documents(source, limit, seq_len, result):
        if not result.add_tokens(document, seq_len, unit_start):
            continue
        result.documents += 1
        result.duplicates += document.content_hash in seen
        seen.add(document.content_hash)
        result.add(document.text)
    return result


def _some_documents(
    source: SourceConfig, limit: int, seq_len: int, result: SourceAudit
) -> Iterator[tuple[Document, int]]:
    """Yield up to `limit` documents, as many from each unit, and note what a build rejects.

    Each comes with the place in its file at which its unit begins.
    """
    units = split_into_units(source)
    if len(units) > limit:
        units = units[:: -(-len(units) // limit)]
    for number, unit in enumerate(units):
        tally = Tally()
        wanted = (limit - result.documents) // (len(units) - number)
        documents = read_documents(source, unit, tally, seq_len)
        for document in itertools.islice(documents, max(wanted, 1)):
            yield document, unit.start
        result.rejects += tally.rejects
        result.notes += tally.notes


_COLUMNS = (
    "source",
    "label",
    "documents",
    "tokens",
    "learned",
    "mislabelled",
    "mojibake",
    "control",
    "copies",
    "rejected",
    "tokens/character",
    "NFKC changes",
    "NFKC damages",
)


def _table_row(source: SourceAudit) -> tuple[str, ...]:
    return (
        source.name,
        source.language,
        f"{source.documents:,}",
        f"{source.document_tokens:,}",
        f"{source.learned_tokens:,}",
        _share(source.mislabelled, source.judged),
        _share(source.mojibake, source.documents),
        _share(source.control, source.documents),
        _share(source.duplicates, source.documents),
        _share(source.rejected, source.documents + source.rejected),
        f"{source.tokens_per_character:.3f}",
        _share(source.nfkc_changed, source.documents),
        _share(source.nfkc_damaged, source.documents),
    )


def _share(count: int, total: int) -> str:
    return f"{count / max(total, 1):.2%}"


def _other_languages(source: SourceAudit) -> str:
    """Return the most frequent languages other than the label, with their counts."""
    others = []
    for name, count in source.languages.most_common():
        if name != source.language:
            others.append(f"{name} ({count})")
    return ", ".join(others[:3])

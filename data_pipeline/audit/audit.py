"""A look at the text itself: is each source what its label says, and in what state is it?

    texts of a source -> language, damage, lengths, tokens, copies -> figures per source -> table
    and page (audit_page)

Decisions
    The input is read as `build` reads it, but nothing is written.  Up to `limit` documents of each
    source are taken, spread evenly over its units, so a large source costs no more than a small
    one. Only a wrong language fails an audit: the other figures need a person.
    Normalisation damage is what NFKC, which people apply without looking, would do to a source:
    shown whether or not the mix asks for it.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator
from typing import Any

from data_pipeline.build.deduplication import content_hash
from data_pipeline.build.sources import read_unit
from data_pipeline.build.units import split
from data_pipeline.build.workers import spread
from data_pipeline.config.mix_config import MixConfig
from data_pipeline.config.source_config import SourceConfig
from data_pipeline.tables import table
from data_pipeline.text.cleaning import Tally
from data_pipeline.text.language import UNTESTABLE, language_of
from data_pipeline.text.tokenizer import encode

DEFAULT_LIMIT = 20_000
"""Documents per source."""
LENGTH_EDGES = tuple(2**power for power in range(4, 22))
"""Characters; lower edges of the length histogram."""
MAX_EXAMPLES = 5
_MOJIBAKE = re.compile(
    "\ufffd|[\u00c2\u00c3][\u0080-\u00bf]|\u00e3\u0081|\u00e3\u0082|\u00e2\u20ac|"
    "[\u7e3a\u7e67\u7e5d][\uff61-\uff9f\u3000-\u30ff\u4e00-\u9fff]|\u6587\u5b57\u5316\u3051\u8a66"
)
"""Replacement characters; UTF-8 read as Latin-1 or Windows-1252; UTF-8 read as Shift-JIS."""
_CONTROL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ufeff]")
_LOST_BY_NFKC = re.compile(
    "[\u00b2\u00b3\u00b9\u2070-\u209c\u00bc-\u00be\u2150-\u215e\u3300-\u33ff\u32c0-\u32fe]"
)
"""Raised and lowered digits, fractions, squared words: NFKC takes their meaning."""


@dataclasses.dataclass(kw_only=True, slots=True)
class SourceAudit:
    """Figures of one source."""

    name: str
    language: str
    documents: int = 0
    """Documents looked at."""
    rejected: int = 0
    """Documents that a build could not use."""
    judged: int = 0
    """Documents whose language can be told."""
    mislabelled: int = 0
    """Documents in another language than the label."""
    languages: Counter[str] = dataclasses.field(default_factory=Counter)
    """Documents by the language found."""
    examples: list[str] = dataclasses.field(default_factory=list)
    """Starts of the first few mislabelled documents."""
    mojibake: int = 0
    """Documents with characters of a wrong decoding."""
    control: int = 0
    """Documents with control characters."""
    duplicates: int = 0
    """Documents that were seen before in the source."""
    characters: int = 0
    bytes: int = 0
    tokens: int = 0
    nfkc_changed: int = 0
    """Documents that NFKC would change."""
    nfkc_damaged: int = 0
    """Documents in which NFKC would destroy a meaning: x squared, one half."""
    notes: Counter[str] = dataclasses.field(default_factory=Counter)
    """What the mix's own normalisation changed, and oddities of the files."""
    lengths: list[int] = dataclasses.field(default_factory=lambda: [0] * len(LENGTH_EDGES))
    """Documents by characters, columns as in LENGTH_EDGES."""

    @property
    def mislabelled_share(self) -> float:
        """Of the documents that can be judged, 0 to 1."""
        return self.mislabelled / max(self.judged, 1)

    @property
    def tokens_per_character(self) -> float:
        """Fertility."""
        return self.tokens / max(self.characters, 1)

    def to_json(self) -> dict[str, Any]:
        """As JSON values."""
        value = dataclasses.asdict(dataclasses.replace(self, languages=Counter(), notes=Counter()))
        value |= {"languages": dict(self.languages), "notes": dict(self.notes)}
        value["mislabelled_share"] = self.mislabelled_share
        value["tokens_per_character"] = self.tokens_per_character
        return value


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Audit:
    """A whole mix."""

    mix: str
    max_mislabelled_share: float
    sources: tuple[SourceAudit, ...]

    def problems(self) -> list[str]:
        """Sources that are not what their label says."""
        return [
            f"source '{s.name}': {s.mislabelled} of {s.judged} documents ({s.mislabelled_share:.1%}) are not in "
            f"'{s.language}' but in {_most(s)}, more than max_mislabelled_share {self.max_mislabelled_share:g}. Split "
            "the source, filter it, or correct its language."
            for s in self.sources
            if s.mislabelled_share > self.max_mislabelled_share
        ]

    def describe(self) -> str:
        """A table for people."""
        header = (
            "source",
            "label",
            "documents",
            "mislabelled",
            "mojibake",
            "control",
            "copies",
            "rejected",
        )
        rows = [
            (
                *(s.name, s.language, f"{s.documents:,}"),
                *(
                    _share(s.mislabelled, s.judged),
                    _share(s.mojibake, s.documents),
                    _share(s.control, s.documents),
                ),
                *(_share(s.duplicates, s.documents), _share(s.rejected, s.documents + s.rejected)),
                *(f"{s.tokens_per_character:.3f}", _share(s.nfkc_changed, s.documents)),
                _share(s.nfkc_damaged, s.documents),
            )
            for s in self.sources
        ]
        return table((*header, "tokens/character", "NFKC changes", "NFKC damages"), rows)


def audit(mix: MixConfig, limit: int = DEFAULT_LIMIT, workers: int = 1) -> Audit:
    """Look at up to `limit` documents of each source that holds text.

    Raises:
        DataError: input that cannot be read.
    """
    jobs = [(source, limit) for source in mix.sources if source.format != "mock"]
    found = {job[0].name: result for job, result in spread(_audit_source, jobs, workers)}
    sources = tuple(found[source.name] for source, _ in jobs)
    return Audit(mix=mix.name, max_mislabelled_share=mix.max_mislabelled_share, sources=sources)


def _audit_source(job: tuple[SourceConfig, int]) -> SourceAudit:
    source, limit = job
    result = SourceAudit(name=source.name, language=source.language)
    seen: set[int] = set()
    for text in _some_texts(source, limit, result):
        key = content_hash(text.encode("utf-8"))
        result.duplicates += key in seen
        seen.add(key)
        _look(text, result)
    return result


def _some_texts(source: SourceConfig, limit: int, result: SourceAudit) -> Iterator[str]:
    """Up to `limit` texts, as many from each unit."""
    units = split(source)
    if len(units) > limit:
        units = units[:: -(-len(units) // limit)]
    for number, unit in enumerate(units):
        tally = Tally()
        wanted = (limit - result.documents) // (len(units) - number)
        for taken, text in enumerate(read_unit(source, unit, tally), 1):
            result.documents += 1
            yield text
            if taken >= wanted:
                break
        result.rejected += tally.rejects.total()
        result.notes += tally.notes


def _look(text: str, result: SourceAudit) -> None:
    """Add one document to the figures."""
    found = None if result.language in UNTESTABLE else language_of(text)
    if found is not None:
        result.judged += 1
        result.languages[found] += 1
        if found != result.language:
            result.mislabelled += 1
            if len(result.examples) < MAX_EXAMPLES:
                result.examples.append(f"[{found}] " + " ".join(text[:160].split()))
    result.mojibake += _MOJIBAKE.search(text) is not None
    result.control += _CONTROL.search(text) is not None
    if not text.isascii():
        result.nfkc_changed += not unicodedata.is_normalized("NFKC", text)
        result.nfkc_damaged += _LOST_BY_NFKC.search(text) is not None
    result.characters += len(text)
    result.bytes += len(text.encode("utf-8"))
    result.tokens += len(encode(text))
    column = max(min(len(text).bit_length() - 5, len(LENGTH_EDGES) - 1), 0)
    result.lengths[column] += 1


def _share(count: int, total: int) -> str:
    return f"{count / max(total, 1):.2%}"


def _most(source: SourceAudit) -> str:
    others = [
        (name, count) for name, count in source.languages.most_common() if name != source.language
    ]
    return ", ".join(f"{name} ({count})" for name, count in others[:3])

"""The data-mix YAML: its keys, and what makes one impossible.

Decisions
    `load_mix` reports every problem in one ConfigError, each with file, line and key.  Rules that
    need several sources read the parsed file itself, not the dataclasses, so a typo in one source
    does not hide a wrong sum of weights. Paths are relative to the YAML file; `MixConfig` holds
    them absolute. A weight of 0 is allowed: such a source is built, and can be measured, but is
    never trained on.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from data_pipeline.config.source_config import LANGUAGES, NAME, SourceConfig
from data_pipeline.config.strict_yaml import Reader, load_yaml, nearest

MAX_SEQ_LEN = 131_072
"""Tokens; the longest context that gpt-oss was trained for."""

WEIGHT_SUM_TOLERANCE = 1e-6
OWN_PREFIX = "guard-"
"""Name of the source of a guard domain with a path: this and the name of the domain."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GuardDomain:
    """Held-out documents that are measured together."""

    name: str
    """Unique name of the domain in metrics."""
    language: str
    """Label of the text, as for a source."""
    sources: tuple[str, ...] = ()
    """Names of sources whose held-out documents form the domain; each needs a `held_out_share`
    above 0."""
    path: str | tuple[str, ...] | None = None
    """Instead of `sources`: files, relative to the YAML file, that are measured as a whole and
    never trained on."""
    format: Literal["auto", "jsonl", "parquet", "text", "harmony"] = "auto"
    """Format of the files of `path`, as for a source."""
    text_field: str = "text"
    """Key or column that holds the text in the files of `path`."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Rules within one domain."""
        if not NAME.fullmatch(self.name):
            yield (
                "name",
                f"is '{self.name}', must be 1 to 64 of: lower-case letters, digits, '_', '-'.",
            )
        if self.language not in LANGUAGES:
            yield (
                "language",
                f"is '{self.language}', which is not known.{nearest(self.language, LANGUAGES)}",
            )
        if not self.sources and self.path is None:
            yield (
                "sources",
                "is an empty list. Name at least one source, give a path, or remove the domain.",
            )
        if self.sources and self.path is not None:
            yield "path", "is given beside sources. Make two domains of it."
        if self.path is None and (self.format, self.text_field) != ("auto", "text"):
            yield "format", "and text_field go with path. Remove them."

    @property
    def own_source(self) -> SourceConfig:
        """The source that holds the files of `path`: built and measured, never trained on."""
        return SourceConfig(
            name=f"{OWN_PREFIX}{self.name}",
            language=self.language,
            domain="guard",
            path=self.path,
            format=self.format,
            text_field=self.text_field,
            weight=0.0,
            held_out_share=1.0,
        )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """How held-out documents are grouped."""

    domains: tuple[GuardDomain, ...] = ()
    """Groups of held-out documents; empty makes one domain of each source that holds out documents,
    with the source's name."""
    min_documents: int = 6
    """Held-out documents that a domain must have. With fewer than 6, even if all of them got worse,
    chance alone would do so more often than the 5 % that a 95 % interval allows (two-sided sign
    test: 2 / 2^5 = 6.3 %)."""
    min_tokens: int = 1000
    """Predicted tokens that the held-out documents of a domain must have."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Rules on the two minimums."""
        for key in ("min_documents", "min_tokens"):
            if getattr(self, key) < 1:
                yield (
                    key,
                    f"is {getattr(self, key)}, must be at least 1: a domain without text cannot be measured.",
                )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class LanguageLimits:
    """Bounds on the share of the predicted tokens that a language may have."""

    min_share: float = 0.0
    """Smallest share, 0 to 1."""
    max_share: float = 1.0
    """Largest share, 0 to 1."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Rules within one language."""
        for key, value in (("min_share", self.min_share), ("max_share", self.max_share)):
            if not 0 <= value <= 1:
                yield key, f"is {value:g}, must be from 0 to 1 (a share of the tokens)."
        if self.min_share > self.max_share:
            yield (
                "min_share",
                f"is {self.min_share:g}, above max_share {self.max_share:g}. No mix can meet both.",
            )


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MixConfig:
    """The data-mix YAML as a whole."""

    name: str = ""
    """Name of the mix; empty takes the file's name without its suffix."""
    seq_len: int
    """Tokens: input slots of a packed row."""
    seed: int
    """Seed of the order of the rows."""
    sources: tuple[SourceConfig, ...]
    """Sources of the mix; at least one."""
    guard: GuardConfig = GuardConfig()
    """How held-out documents are grouped for the guard."""
    max_reject_share: float = 0.05
    """Share of a source's documents that may be unusable before the build stops, 0 to 1."""
    languages: dict[str, LanguageLimits] = dataclasses.field(default_factory=dict)
    """Bounds on the share of a language, by language; a mix outside them is refused."""
    packing: Literal["best_fit", "concatenate"] = "best_fit"
    """best_fit keeps documents whole; concatenate fills each row to the end and cuts documents
    there, for comparison."""
    near_duplicates: float = 0.8
    """Jaccard similarity of 5-token shingles from which on a document counts as a copy; 0 finds
    exact copies only."""
    decontaminate_tokens: int = 50
    """A document that shares a run of this many tokens with a held-out document is not trained on;
    0 turns this off. Runs that occur in more than 10 documents are boilerplate and do not count."""
    max_mislabelled_share: float = 0.05
    """Share of a source's documents that may be in another language than its label before `audit`
    fails, 0 to 1."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Rules on the top-level keys alone; those that span sources are in `_check_across`."""
        if self.name and not NAME.fullmatch(self.name):
            yield (
                "name",
                f"is '{self.name}', must be 1 to 64 of: lower-case letters, digits, '_', '-'.",
            )
        if not 0 <= self.seed < 2**63:
            yield "seed", f"is {self.seed}, must be from 0 to 2^63 - 1."
        if not 0 <= self.max_reject_share <= 1:
            yield "max_reject_share", f"is {self.max_reject_share:g}, must be from 0 to 1."
        if not 0 <= self.max_mislabelled_share <= 1:
            yield (
                "max_mislabelled_share",
                f"is {self.max_mislabelled_share:g}, must be from 0 to 1.",
            )
        if self.near_duplicates != 0 and not 0.5 <= self.near_duplicates <= 1:
            yield (
                "near_duplicates",
                f"is {self.near_duplicates:g}, must be 0 (off), or from 0.5 to 1.",
            )
        if self.decontaminate_tokens != 0 and not 16 <= self.decontaminate_tokens <= 1024:
            yield (
                "decontaminate_tokens",
                f"is {self.decontaminate_tokens}, must be 0 (off), or from 16 to 1024 tokens.",
            )

    def guard_domains(self) -> tuple[GuardDomain, ...]:
        """The domains asked for, or one per source with held-out documents."""
        return self.guard.domains or tuple(
            GuardDomain(name=source.name, language=source.language, sources=(source.name,))
            for source in self.sources
            if source.held_out_share > 0
        )


def load_mix(path: Path | str) -> MixConfig:
    """Read and check a data-mix YAML.

    Raises:
        ConfigError: with every problem found, each as `file:line: key message`.
    """
    from data_pipeline.config.schema_checks import check_across

    path = Path(path)
    reader = Reader(load_yaml(path))
    base = path.resolve().parent
    mix = reader.read(MixConfig)
    if isinstance(reader.located.value, dict):
        check_across(reader, reader.located.value, base)
    reader.finish()
    assert mix is not None
    own = [domain.own_source for domain in mix.guard.domains if domain.path is not None]
    sources = [
        dataclasses.replace(
            source, path=tuple(str(base / pattern) for pattern in source.patterns()) or None
        )
        for source in (*mix.sources, *own)
    ]
    domains = [
        domain
        if domain.path is None
        else GuardDomain(
            name=domain.name, language=domain.language, sources=(domain.own_source.name,)
        )
        for domain in mix.guard.domains
    ]
    guard = dataclasses.replace(mix.guard, domains=tuple(domains))
    return dataclasses.replace(mix, name=mix.name or path.stem, sources=tuple(sources), guard=guard)

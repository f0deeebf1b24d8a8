"""The data-mix YAML: its keys, and what makes one impossible.

Decisions
    `load_mix` reports every problem in one ConfigError, each with file, line and key.  Rules that need several sources
    read the parsed file itself, not the dataclasses, so a typo in one source does not hide a wrong sum of weights.
    Paths are relative to the YAML file; `MixConfig` holds them absolute.
    A weight of 0 is allowed: such a source is built, and can be measured, but is never trained on.
"""

from __future__ import annotations

import dataclasses
import glob
import math
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from data_pipeline.strict_yaml import KeyPath, Reader, load_yaml, nearest

LANGUAGES = (
    *("ja", "en", "code", "math", "parallel", "mixed"),
    *("ar", "cs", "de", "el", "es", "fa", "fr", "he", "hi", "id", "it", "ko", "nl", "pl", "pt", "ro", "ru", "sv", "th"),
    *("tr", "uk", "vi", "zh"),
)
"""What `language` may be: ISO 639-1 codes, and four kinds of text that are not one natural language."""

MAX_SEQ_LEN = 131_072
"""Tokens; the longest context that gpt-oss was trained for."""

SUFFIXES = {".jsonl": "jsonl", ".parquet": "parquet", ".txt": "text", ".md": "text"}
"""What `format: auto` reads a file as."""

WEIGHT_SUM_TOLERANCE = 1e-6
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SourceConfig:
    """One stream of documents of one language and domain."""

    name: str
    """Unique within the mix; names folders and metrics: lower-case letters, digits, `_` and `-`."""
    language: str
    """One of LANGUAGES."""
    domain: str
    """Kind of text, free: web, encyclopedia, code."""
    path: str | tuple[str, ...] | None = None
    """File, glob, or a list of them, relative to the YAML file; none for `format: mock`."""
    format: Literal["auto", "jsonl", "parquet", "text", "mock"] = "auto"
    """`auto` goes by the suffix; `text` is one document a file; `mock` is random tokens for speed tests."""
    text_field: str = "text"
    """Key (JSONL) or column (Parquet) that holds the text."""
    weight: float
    """Share of the predicted tokens, 0 to 1; all weights sum to 1."""
    held_out_share: float = 0.0
    """Share of the documents that are never trained on, 0 to 1."""
    max_epochs: float | None = None
    """Epochs; a plan that repeats the source more often is refused."""
    num_documents: int | None = None
    """Documents to invent, for `format: mock` only."""
    mean_tokens: int | None = None
    """Mean tokens per invented document, for `format: mock` only."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Rules within one source."""
        if not _NAME.fullmatch(self.name):
            yield "name", f"is '{self.name}', must be 1 to 64 of: lower-case letters, digits, '_', '-'."
        if self.language not in LANGUAGES:
            yield "language", f"is '{self.language}', which is not known.{nearest(self.language, LANGUAGES)}"
        if not self.domain.strip():
            yield "domain", "is empty. Say what kind of text this is, for example: web."
        if not 0 <= self.held_out_share <= 1:
            yield "held_out_share", f"is {self.held_out_share:g}, must be from 0 to 1 (a share of the documents)."
        if self.held_out_share == 1 and self.weight > 0:
            yield "held_out_share", "is 1, which leaves nothing to train on. Set weight: 0, or hold out less."
        if self.max_epochs is not None and self.max_epochs <= 0:
            yield "max_epochs", f"is {self.max_epochs:g}, must be above 0. Remove it to repeat without limit."
        yield from self._check_mock()

    def _check_mock(self) -> Iterator[tuple[str, str]]:
        mock = self.format == "mock"
        if mock and self.path is not None:
            yield "path", "is given, but format: mock reads no files. Remove one of the two."
        for key, value in (("num_documents", self.num_documents), ("mean_tokens", self.mean_tokens)):
            if value is None and mock:
                yield key, "is missing. format: mock needs it."
            elif value is not None and not mock:
                yield key, "is given, but only format: mock invents documents. Remove it."
            elif value is not None and value < 2:
                yield key, f"is {value}, must be at least 2."

    def patterns(self) -> tuple[str, ...]:
        """`path` as a list."""
        return () if self.path is None else (self.path,) if isinstance(self.path, str) else self.path

    def files(self) -> list[Path]:
        """The input files: patterns in the order given, the files of a glob sorted by name."""
        return [path for pattern in self.patterns() for path in expand(pattern)]

    def format_of(self, path: Path) -> str | None:
        """The format to read `path` in; None if `auto` does not know the suffix."""
        return SUFFIXES.get(path.suffix.lower()) if self.format == "auto" else self.format


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GuardDomain:
    """Held-out documents that are measured together."""

    name: str
    """Unique; names the domain in metrics."""
    language: str
    """One of LANGUAGES."""
    sources: tuple[str, ...]
    """Names of sources with held_out_share > 0."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Rules within one domain."""
        if not _NAME.fullmatch(self.name):
            yield "name", f"is '{self.name}', must be 1 to 64 of: lower-case letters, digits, '_', '-'."
        if self.language not in LANGUAGES:
            yield "language", f"is '{self.language}', which is not known.{nearest(self.language, LANGUAGES)}"
        if not self.sources:
            yield "sources", "is an empty list. Name at least one source, or remove the domain."


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GuardConfig:
    """How held-out documents are grouped."""

    domains: tuple[GuardDomain, ...] = ()
    """Empty: one domain per source that has held-out documents, named like the source."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class MixConfig:
    """A whole data mix."""

    name: str = ""
    """What the mix is called; empty: the name of its file without the suffix."""
    seq_len: int
    """Tokens: input slots in a packed row."""
    seed: int
    """Decides the order of the rows."""
    sources: tuple[SourceConfig, ...]
    """At least one."""
    guard: GuardConfig = GuardConfig()
    """Grouping of held-out documents."""
    max_reject_share: float = 0.05
    """Share of a source's documents that may be unusable before the build stops, 0 to 1."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Rules on the top-level keys alone; those that span sources are in `_check_across`."""
        if self.name and not _NAME.fullmatch(self.name):
            yield "name", f"is '{self.name}', must be 1 to 64 of: lower-case letters, digits, '_', '-'."
        if not 0 <= self.seed < 2**63:
            yield "seed", f"is {self.seed}, must be from 0 to 2^63 - 1."
        if not 0 <= self.max_reject_share <= 1:
            yield "max_reject_share", f"is {self.max_reject_share:g}, must be from 0 to 1."

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
    path = Path(path)
    reader = Reader(load_yaml(path))
    base = path.resolve().parent
    mix = reader.read(MixConfig)
    if isinstance(reader.located.value, dict):
        _check_across(reader, reader.located.value, base)
    reader.finish()
    assert mix is not None
    sources = [
        dataclasses.replace(source, path=tuple(str(base / pattern) for pattern in source.patterns()) or None)
        for source in mix.sources
    ]
    return dataclasses.replace(mix, name=mix.name or path.stem, sources=tuple(sources))


def expand(pattern: str) -> list[Path]:
    """Files that an absolute path or glob names, sorted."""
    if not glob.has_magic(pattern) or Path(pattern).exists():
        return [Path(pattern)] if Path(pattern).is_file() else []
    return sorted(path for path in map(Path, glob.glob(pattern, recursive=True)) if path.is_file())


def _check_across(reader: Reader, raw: dict[str, Any], base: Path) -> None:
    """Rules that need several sources, read from the parsed file so that other problems do not hide them."""
    seq_len = raw.get("seq_len")
    if type(seq_len) is int and not 2 <= seq_len <= MAX_SEQ_LEN:
        reader.problem(("seq_len",), f"is {seq_len}, must be from 2 to {MAX_SEQ_LEN} (the context of gpt-oss).")
    listed = raw.get("sources")
    if listed == []:
        reader.problem(("sources",), "is an empty list. Add at least one source.")
    if not isinstance(listed, list) or not listed:
        return
    sources = {index: source for index, source in enumerate(listed) if isinstance(source, dict)}
    names = {index: source["name"] for index, source in sources.items() if isinstance(source.get("name"), str)}
    _check_unique(reader, {("sources", index, "name"): name for index, name in names.items()})
    _check_weights(reader, sources)
    for index, source in sources.items():
        if source.get("format") != "mock":
            _check_files(reader, source, ("sources", index, "path"), base)
    _check_guard(reader, raw.get("guard"), {source.get("name"): source for source in sources.values()})


def _check_unique(reader: Reader, names: dict[KeyPath, str]) -> None:
    counts = Counter(names.values())
    first: dict[str, KeyPath] = {}
    for path, name in names.items():
        if counts[name] > 1 and name in first:
            line = reader.located.lines.get(first[name], "?")
            reader.problem(path, f"is '{name}', which line {line} uses, too. Give each its own name.")
        first.setdefault(name, path)


def _check_weights(reader: Reader, sources: dict[int, dict[str, Any]]) -> None:
    weights = {index: source.get("weight") for index, source in sources.items()}
    numbers = {i: float(w) for i, w in weights.items() if isinstance(w, (int, float)) and not isinstance(w, bool)}
    negative = [index for index, weight in numbers.items() if weight < 0]
    for index in negative:
        reader.problem(
            ("sources", index, "weight"),
            f"is {numbers[index]:g}, must be >= 0. Remove the source or give it a share of the tokens.",
        )
    if len(numbers) < len(weights) or negative or not all(map(math.isfinite, numbers.values())):
        return
    total = math.fsum(numbers.values())
    if total == 0:
        reader.problem(("sources",), "have weights that are all 0. Give at least one a share of the tokens.")
    elif abs(total - 1) > WEIGHT_SUM_TOLERANCE:
        names = (sources[index].get("name", f"sources[{index}]") for index in numbers)
        scaled = ", ".join(f"{name} {weight / total:.6g}" for name, weight in zip(names, numbers.values(), strict=True))
        reader.problem(("sources",), f"have weights that sum to {total:.9g}, must be 1. Scaled to 1: {scaled}.")


def _check_files(reader: Reader, source: dict[str, Any], path: KeyPath, base: Path) -> None:
    patterns = source.get("path")
    if patterns is None:
        reader.problem(path, "is missing. Give a file, a glob, or a list of them.")
    if patterns == []:
        reader.problem(path, "is an empty list. Give at least one file or glob.")
    patterns = [patterns] if isinstance(patterns, str) else patterns if isinstance(patterns, list) else []
    seen: set[Path] = set()
    for pattern in patterns:
        files = expand(str(base / pattern)) if isinstance(pattern, str) and pattern else []
        if isinstance(pattern, str) and not files:
            reader.problem(path, f"is '{pattern}', which matches no file (looked in {base}).")
        twice = [file for file in files if file in seen]
        if twice:
            reader.problem(path, f"names {twice[0]} twice. Remove one.")
        seen.update(files)
        unknown = [file for file in files if file.suffix.lower() not in SUFFIXES]
        if unknown and source.get("format", "auto") == "auto":
            known = ", ".join(SUFFIXES)
            reader.problem(path, f"names {unknown[0]}, whose suffix is not one of {known}. Set format.")


def _check_guard(reader: Reader, guard: Any, sources: dict[Any, dict[str, Any]]) -> None:
    domains = guard.get("domains") if isinstance(guard, dict) else None
    names: dict[KeyPath, str] = {}
    for number, domain in enumerate(domains if isinstance(domains, list) else []):
        if not isinstance(domain, dict):
            continue
        path: KeyPath = ("guard", "domains", number)
        if isinstance(domain.get("name"), str):
            names[(*path, "name")] = domain["name"]
        listed = domain.get("sources")
        members = listed if isinstance(listed, list) else []
        for index, member in enumerate(members):
            here = (*path, "sources", index)
            if member not in sources:
                reader.problem(here, f"is '{member}', which is no source.{nearest(str(member), map(str, sources))}")
            elif not sources[member].get("held_out_share"):
                reader.problem(here, f"is '{member}', which holds out nothing. Set its held_out_share above 0.")
            if member in members[:index]:
                reader.problem(here, f"is '{member}', which the list already has. Remove one.")
    _check_unique(reader, names)

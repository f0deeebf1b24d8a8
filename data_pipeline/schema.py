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
import re
import string
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from data_pipeline.strict_yaml import Reader, load_yaml, nearest

LANGUAGES = (
    *("ja", "en", "code", "math", "parallel", "mixed"),
    *("ar", "cs", "de", "el", "es", "fa", "fr", "he", "hi", "id", "it", "ko", "nl", "pl", "pt", "ro", "ru", "sv", "th"),
    *("tr", "uk", "vi", "zh"),
)
"""What `language` may be: ISO 639-1 codes, and four kinds of text that are not one natural language."""

MAX_SEQ_LEN = 131_072
"""Tokens; the longest context that gpt-oss was trained for."""

SUFFIXES = {".jsonl": "jsonl", ".parquet": "parquet", ".txt": "text", ".md": "text"}
"""What `format: auto` reads a file as, once COMPRESSIONS is taken off its name."""
COMPRESSIONS = (".gz", ".zst")
"""Suffixes of compressed JSONL and text files."""
FILE_FORMATS = ("auto", "jsonl", "parquet", "text")
"""Formats whose `path` names files; that of the others is a folder, or there is none."""

WEIGHT_SUM_TOLERANCE = 1e-6
_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,63}")
_COMMIT = re.compile(r"[0-9a-f]{40}")

Normalisation = Literal["newlines", "nfc", "nfkc", "width", "control", "spaces"]
"""What may be done to a text; `clean` says what each step does, and what it destroys."""


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
    """File, glob, or a list of them, relative to the YAML file; a folder for `huggingface` and `build`."""
    format: Literal["auto", "jsonl", "parquet", "text", "huggingface", "build", "mock"] = "auto"
    """`auto` goes by the suffix; `text` is one document a file; `huggingface` a dataset, from the hub or saved on disk;
    `build` the training documents of an earlier build; `mock` random tokens for speed tests."""
    text_field: str = "text"
    """Key (JSONL) or column (Parquet, datasets) that holds the text."""
    template: str | None = None
    """Text made of several fields, for example "{title}\n\n{body}"; replaces `text_field`."""
    dataset: str | None = None
    """Name on the Hugging Face hub, for `format: huggingface` without `path`."""
    revision: str | None = None
    """Commit of `dataset`: 40 hexadecimal digits, so that the text cannot change under the run."""
    subset: str | None = None
    """Configuration of `dataset`, if it has several."""
    split: str = "train"
    """Split of a Hugging Face dataset."""
    build_sources: tuple[str, ...] = ()
    """Sources of an earlier build to take; empty: all of them."""
    normalise: tuple[Normalisation, ...] = ()
    """Steps done to each text, in the order of `clean.STEPS`; empty: the text is taken as it stands."""
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
        yield from self._check_text()
        yield from self._check_place()
        yield from self._check_mock()

    def _check_text(self) -> Iterator[tuple[str, str]]:
        if self.template is not None:
            try:
                fields = template_fields(self.template)
            except ValueError as error:
                yield "template", f"is not a template: {error}. Write a brace that is text twice: {{{{."
            else:
                if not fields:
                    yield "template", "names no field. Write fields in braces, for example: '{title}\\n{text}'."
        if self.format in ("text", "build", "mock") and (self.template is not None or self.text_field != "text"):
            key = "text_field" if self.template is None else "template"
            yield key, f"is given, but format: {self.format} has no fields. Remove it."
        if "nfc" in self.normalise and "nfkc" in self.normalise:
            yield "normalise", "lists nfc and nfkc. Choose one."
        if self.normalise and self.format == "mock":
            yield "normalise", "is given, but format: mock has no text. Remove it."

    def _check_place(self) -> Iterator[tuple[str, str]]:
        hub = self.format == "huggingface" and self.path is None
        if hub and self.dataset is None:
            yield "dataset", "is missing. Give a name on the hub, or the path of a dataset saved on disk."
        if hub and self.dataset is not None and not _COMMIT.fullmatch(self.revision or ""):
            yield "revision", f"is '{self.revision}', must be a commit (40 hexadecimal digits): names move."
        for key in ("dataset", "revision", "subset"):
            if getattr(self, key) is not None and not hub:
                yield key, "is given, but only format: huggingface without a path uses it. Remove it."
        if self.split != "train" and self.format != "huggingface":
            yield "split", "is given, but only format: huggingface has splits. Remove it."
        if self.build_sources and self.format != "build":
            yield "build_sources", "is given, but only format: build has them. Remove it."
        if self.format in ("huggingface", "build") and isinstance(self.path, tuple):
            yield "path", f"is a list, but format: {self.format} reads one folder. Make one source of each."
        if self.format == "build" and self.path is None:
            yield "path", "is missing. Give the folder of an earlier build."

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
        """The input files: patterns in the order given, the files of a glob or of a folder sorted by name."""
        if self.format not in FILE_FORMATS:
            folders = [Path(pattern) for pattern in self.patterns()]
            return sorted(path for folder in folders for path in folder.rglob("*") if path.is_file())
        return [path for pattern in self.patterns() for path in expand(pattern)]

    def format_of(self, path: Path) -> str | None:
        """The format to read `path` in; None if `auto` does not know the suffix."""
        return suffix_format(path) if self.format == "auto" else self.format


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
class LanguageLimits:
    """Bounds on the share of the predicted tokens that a language may have."""

    min_share: float = 0.0
    """0 to 1."""
    max_share: float = 1.0
    """0 to 1."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Rules within one language."""
        for key, value in (("min_share", self.min_share), ("max_share", self.max_share)):
            if not 0 <= value <= 1:
                yield key, f"is {value:g}, must be from 0 to 1 (a share of the tokens)."
        if self.min_share > self.max_share:
            yield "min_share", f"is {self.min_share:g}, above max_share {self.max_share:g}. No mix can meet both."


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
    languages: dict[str, LanguageLimits] = dataclasses.field(default_factory=dict)
    """Floors and ceilings by language; a mix outside them is refused."""
    packing: Literal["best_fit", "concatenate"] = "best_fit"
    """`concatenate` fills each row to the brim and cuts documents at its end; it is there for comparison."""
    near_duplicates: float = 0.8
    """Jaccard similarity of 5-token shingles from which on a document counts as a copy; 0: exact copies only."""
    decontaminate_tokens: int = 50
    """A document that shares a run of this many tokens with a held-out one is not trained on; 0: off.  Runs that more
    than 10 documents have are stock texts and do not count."""
    max_mislabelled_share: float = 0.05
    """Share of a source's documents that may be in another language than its label before `audit` fails, 0 to 1."""

    def check(self) -> Iterator[tuple[str, str]]:
        """Rules on the top-level keys alone; those that span sources are in `_check_across`."""
        if self.name and not _NAME.fullmatch(self.name):
            yield "name", f"is '{self.name}', must be 1 to 64 of: lower-case letters, digits, '_', '-'."
        if not 0 <= self.seed < 2**63:
            yield "seed", f"is {self.seed}, must be from 0 to 2^63 - 1."
        if not 0 <= self.max_reject_share <= 1:
            yield "max_reject_share", f"is {self.max_reject_share:g}, must be from 0 to 1."
        if not 0 <= self.max_mislabelled_share <= 1:
            yield "max_mislabelled_share", f"is {self.max_mislabelled_share:g}, must be from 0 to 1."
        if self.near_duplicates != 0 and not 0.5 <= self.near_duplicates <= 1:
            yield "near_duplicates", f"is {self.near_duplicates:g}, must be 0 (off), or from 0.5 to 1."
        if self.decontaminate_tokens != 0 and not 16 <= self.decontaminate_tokens <= 1024:
            yield "decontaminate_tokens", f"is {self.decontaminate_tokens}, must be 0 (off), or from 16 to 1024 tokens."

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
    from data_pipeline.schema_checks import check_across

    path = Path(path)
    reader = Reader(load_yaml(path))
    base = path.resolve().parent
    mix = reader.read(MixConfig)
    if isinstance(reader.located.value, dict):
        check_across(reader, reader.located.value, base)
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


def suffix_format(path: Path) -> str | None:
    """The format that the name of a file stands for; None if it is not known."""
    name = path.name.lower()
    for suffix in COMPRESSIONS:
        if name.endswith(suffix):
            known = SUFFIXES.get(Path(name.removesuffix(suffix)).suffix)
            return known if known != "parquet" else None
    return SUFFIXES.get(Path(name).suffix)


def template_fields(template: str) -> tuple[str, ...]:
    """Names of the fields in a template, in order.

    Raises:
        ValueError: a brace is left open, or a field is not a plain name.
    """
    names = []
    for _, name, spec, conversion in string.Formatter().parse(template):
        if name is None:
            continue
        if not name or spec or conversion or set(".[]") & set(name):
            raise ValueError(f"'{{{name}}}' is not a plain field name")
        names.append(name)
    return tuple(names)

"""The manifest of a build: what was built from which settings, and the hash of every file.

Decisions
    A build is complete if and only if its manifest is there and every listed file matches it; the
    manifest is written last and carries a checksum of itself.
    It holds no time, host or absolute path: equal input gives an equal manifest, byte for byte.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.bounded.files import MalformedInput
from data_pipeline.bounded.json_text import read_json
from data_pipeline.config.mix_config import GuardDomain
from data_pipeline.errors import DataError
from data_pipeline.escaping import escaped_line
from data_pipeline.store.entry_types import check_types
from data_pipeline.store.files import write_json
from data_pipeline.store.ownership import refuse_foreign
from data_pipeline.store.row_files import DERIVED_FILES
from data_pipeline.store.shards import SUFFIX

FORMAT_VERSION = 5
READABLE_VERSIONS = (4, 5)
"""Versions that this code reads. Version 5 counts what was dropped, and cuts documents."""
FILE_NAME = "manifest.json"
TRAIN_FOLDER = "train"
"""Folder with the training rows of a source; the row length follows if the mix has stages."""
_MAX_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """One file of the build."""

    bytes: int
    """Size of the file."""
    sha256: str
    """Hex sha256 of its content."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StageEntry:
    """The training rows of one stage of one source."""

    seq_len: int
    """Tokens: input slots of a packed row."""
    documents: int
    """Documents in the rows."""
    tokens: int
    """Tokens of those documents, END_OF_TEXT included."""
    predicted_tokens: int
    """Labels in the rows that bear loss."""
    bytes: int
    """UTF-8 bytes of those documents."""
    rows: int
    """Number of rows."""
    slots: int = 0
    """Slots of the rows that hold a token of a document, if the documents have loss masks, so that
    not each of them has a label; 0, and absent from the file, if they have none."""

    @property
    def used_slots(self) -> int:
        """Slots of the rows that hold a token of a document."""
        return self.slots or self.predicted_tokens

    @property
    def folder(self) -> str:
        """Name of the folder with the rows, in that of the source."""
        return f"{TRAIN_FOLDER}-{self.seq_len}"


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceEntry:
    """One source of the build."""

    name: str
    """Name of the source in the mix."""
    language: str
    """Language label at build time."""
    domain: str
    """Domain label at build time."""
    documents: int
    """Documents in training rows."""
    tokens: int
    """Tokens of those documents, END_OF_TEXT included."""
    predicted_tokens: int
    """Labels in training rows that bear loss."""
    bytes: int
    """UTF-8 bytes of those documents."""
    rows: int
    """Number of training rows."""
    held_out_documents: int
    """Documents that are measured and never trained on."""
    held_out_rows: int
    """Rows of those documents."""
    held_out_tokens: int
    """Labels in those rows that bear loss."""
    held_out_hash: str
    """Hex sha256 of the sorted content hashes of the held-out documents."""
    held_out_found: int
    """Held-out documents whose copy or long run stood in training text, which was dropped."""
    duplicates: int
    """Documents dropped as exact copies of another document of the mix."""
    near_duplicates: int
    """Documents dropped as near copies of another document of the mix."""
    contaminated: int
    """Documents dropped because they share a long run of tokens with a held-out document."""
    held_out_copies: int
    """Documents dropped because another source holds out the same text."""
    base_model: str
    """Hash of the model that wrote the text (`self_replay.weights_hash`); empty for given text."""
    rejects: Mapping[str, int]
    """Number of unusable documents by reason."""
    notes: Mapping[str, int]
    """Number of oddities that cost no document, by kind."""
    stages: tuple[StageEntry, ...] = ()
    """The training rows by stage, which `documents` to `rows` add up; empty if the mix has none."""

    @property
    def train_folders(self) -> tuple[str, ...]:
        """Names of the folders with training rows, in that of the source: one for each stage."""
        return tuple(stage.folder for stage in self.stages) or (TRAIN_FOLDER,)

    read_documents: int = 0
    """Documents that could be used, before any was dropped; 0 in builds that did not count them."""
    read_tokens: int = 0
    """Tokens of those documents, END_OF_TEXT included."""
    dropped: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """What was dropped, by reason: `documents`, `tokens` (absent where nobody knows them), and for
    stretches the number of `cut_documents` that lost one."""
    exempted: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    """What stays against a rule, by the reason why: `documents`, and `tokens` of it in them."""
    held_out_unsearched: int = 0
    """Held-out documents too short to be searched for in training text: only documents that are
    copies of one were dropped."""
    slots: int = 0
    """Slots of the training rows that hold a token of a document, if the documents have loss masks,
    so that not each of them has a label; 0, and absent from the file, if they have none."""

    @property
    def has_loss(self) -> bool:
        """Whether the documents have loss masks."""
        return self.slots > 0

    @property
    def used_slots(self) -> int:
        """Slots of the training rows that hold a token of a document."""
        return self.slots or self.predicted_tokens


@dataclass(frozen=True, kw_only=True, slots=True)
class StockText:
    """Held-out text that stays in training documents because very many have it."""

    held_out_by: str
    """Source of a held-out document that has it."""
    text: str
    """Its beginning."""
    tokens: int
    """Tokens of it."""
    documents: int
    """Training documents that have it."""
    examples: tuple[str, ...]
    """Some of those documents."""


@dataclass(frozen=True, kw_only=True, slots=True)
class InputFiles:
    """The input files of one source."""

    files: int
    """Number of files."""
    bytes: int
    """Size of all files."""
    sizes_hash: str
    """Hex sha256 of the names and sizes, in order."""
    contents_hash: str
    """Hex sha256 of the names, sizes and hashes of content."""
    listed: tuple[tuple[str, int, str], ...]
    """Name, size and hex xxh3_128 of each file; empty if there are very many files."""

    @property
    def is_listed(self) -> bool:
        """Whether each file is in `listed`."""
        return len(self.listed) == self.files


@dataclass(frozen=True, kw_only=True, slots=True)
class GuardSet:
    """The held-out text of one guard domain."""

    documents: int
    """Number of documents."""
    tokens: int
    """Predicted tokens of the documents."""
    found: int
    """Documents whose copy or long run stood in training text, which was dropped."""
    unsearched: int
    """Documents too short to be searched for in training text."""
    hash: str
    """Hex sha256 over the `held_out_hash` of the domain's sources."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BuildManifest:
    """Everything about a build that is not in its tokens."""

    format_version: int
    """`FORMAT_VERSION` of the code that built it."""
    fingerprint: str
    """`origin.fingerprint` of the mix and its input files."""
    tokenizer: str
    """Name of the tokenizer."""
    tokenizer_sha256: str
    """Hex sha256 of the tokenizer's ranks."""
    seq_len: int
    """Tokens: input slots of a packed row."""
    sources: tuple[SourceEntry, ...]
    """Sources in the order of the mix."""
    guard_domains: tuple[GuardDomain, ...]
    """Guard domains of the mix at build time."""
    rules: Mapping[str, Any] = field(default_factory=dict)
    """`origin.build_rules` of the mix; empty in builds of versions that did not keep them."""
    inputs: Mapping[str, InputFiles] = field(default_factory=dict)
    """Input files by source; empty in builds of versions that did not keep them."""
    files: Mapping[str, FileEntry]
    """Files by path relative to the build."""
    stock_text: tuple[StockText, ...] = ()
    """Held-out text that the mix lets through, the most frequent ones."""

    def content(self) -> dict[str, Any]:
        """Return the manifest as JSON values, without the checksum."""
        content: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        for source in content["sources"]:
            for entry in (source, *source["stages"]):
                if not entry["slots"]:  # builds without masks are those of earlier versions
                    del entry["slots"]
        for domain in content["guard_domains"]:
            if domain["normalise"] is None:  # it belongs to files, which are a source here
                del domain["normalise"]
        return content

    @property
    def hash(self) -> str:
        """Hex sha256 of the content, which identifies the build."""
        return _checksum(self.content())

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Slots of the training rows of each stage; one number if the mix has no stages."""
        return tuple(stage.seq_len for stage in self.sources[0].stages) or (self.seq_len,)

    def shard_names(self, source: str) -> list[str]:
        """Return the names of the token shards in a source's folder, in order."""
        folder = f"{source}/"
        names = []
        for path in self.files:
            if path.startswith(folder) and path.endswith(SUFFIX):
                name = path.removeprefix(folder)
                if "/" not in name:
                    names.append(name)
        # a number of more digits comes after one of fewer
        return sorted(names, key=lambda name: (len(name), name))

    def guard_sets(self) -> dict[str, GuardSet]:
        """Return the held-out text of each guard domain, by the domain's name."""
        entries = {source.name: source for source in self.sources}
        sets = {}
        for domain in self.guard_domains:
            documents = 0
            tokens = 0
            found = 0
            unsearched = 0
            hashes = []
            for name in domain.sources:
                entry = entries[name]
                documents += entry.held_out_documents
                tokens += entry.held_out_tokens
                found += entry.held_out_found
                unsearched += entry.held_out_unsearched
                hashes.append(entry.held_out_hash)
            sets[domain.name] = GuardSet(
                documents=documents,
                tokens=tokens,
                found=found,
                unsearched=unsearched,
                hash=_hash_of(hashes),
            )
        return sets

    def row_hashes(self) -> dict[str, str]:
        """Return, by source, a hex sha256 over the files that its training rows come from."""
        hashes = {}
        for source in self.sources:
            prefixes = [f"{source.name}/documents"]
            for folder in source.train_folders:
                prefixes.append(f"{source.name}/{folder}/")
            files = []
            for name, entry in self.files.items():
                is_row_file = name.startswith(tuple(prefixes))
                if is_row_file and PurePosixPath(name).name not in DERIVED_FILES:
                    files.append((name, entry.sha256))
            hashes[source.name] = _hash_of(sorted(files))
        return hashes

    def write(self, directory: Path) -> None:
        """Write `manifest.json` atomically."""
        content = self.content()
        content["checksum"] = _checksum(content)
        write_json(directory / FILE_NAME, content, indent=1, sort_keys=True)


def read_manifest(directory: Path, *, is_known: bool = False) -> BuildManifest:
    """Read and check `manifest.json`.

    Args:
        directory: The build.
        is_known: Another rank has just looked at who may write to the build.

    Raises:
        DataError: The file is missing, damaged, of another format, or names a file outside the
            build.
        ConfigError: The build is not this user's alone.
    """
    path = directory / FILE_NAME
    content = _read_content(path, is_known)
    found = content.get("format_version")
    if found not in READABLE_VERSIONS:
        raise DataError(
            f"{path}: has format version {escaped_line(found, 100)}, this code reads "
            f"{READABLE_VERSIONS[0]} to {FORMAT_VERSION}. Build it again."
        )
    try:
        manifest = _from_content(content)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        reason = escaped_line(error, 500)
        raise DataError(f"{path}: lacks or misnames a key: {reason}. Build it again.") from error
    for name in manifest.files:
        if not _is_inside(name):
            raise DataError(
                f"{path}: lists '{escaped_line(name, 200)}', which is not a path inside the build."
            )
    return manifest


def _read_content(path: Path, is_known: bool) -> dict[str, Any]:
    """Read the JSON of a manifest and compare it with its checksum."""
    try:
        if not is_known:
            refuse_foreign(path.parent, "build")
        size = path.stat().st_size
        if size > _MAX_BYTES:
            raise DataError(f"{path}: {size} bytes, more than any manifest has.")
        # it names input files, whose names may be no Unicode
        content = read_json(path, _MAX_BYTES, lone_surrogates=True)
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}). The build is incomplete: build it again."
        ) from None
    except MalformedInput as error:
        raise DataError(
            f"{path}: not JSON. The build is damaged: delete it and build it again."
        ) from error
    if not isinstance(content, dict) or content.pop("checksum", None) != _checksum(content):
        raise DataError(
            f"{path}: does not match its own checksum. Delete the build and build it again."
        )
    return content


def _hash_of(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _checksum(content: dict[str, Any]) -> str:
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def _from_content(content: dict[str, Any]) -> BuildManifest:
    values = dict(content)
    values["sources"] = tuple(map(_source_entry, content["sources"]))
    values["guard_domains"] = tuple(map(_guard_domain, content["guard_domains"]))
    values["stock_text"] = tuple(map(_stock_text, content.get("stock_text", ())))
    values["inputs"] = {}
    for name, entry in content.get("inputs", {}).items():
        listed = tuple(tuple(facts) for facts in entry["listed"])
        values["inputs"][name] = InputFiles(**{**entry, "listed": listed})
    values["files"] = {name: FileEntry(**entry) for name, entry in content["files"].items()}
    manifest = BuildManifest(**values)
    _check_entries(manifest)
    return manifest


def _source_entry(content: dict[str, Any]) -> SourceEntry:
    stages = tuple(StageEntry(**stage) for stage in content.get("stages", ()))
    return SourceEntry(**{**content, "stages": stages})


def _check_entries(manifest: BuildManifest) -> None:
    """Refuse values of other types, and guard domains of sources that are not there.

    Raises:
        ValueError: the first one that is wrong.
    """
    check_types(manifest, "the manifest")
    for number, source in enumerate(manifest.sources):
        check_types(source, f"sources[{number}]")
        for stage_number, stage in enumerate(source.stages):
            check_types(stage, f"sources[{number}].stages[{stage_number}]")
        if source.train_folders != manifest.sources[0].train_folders:
            raise ValueError(f"sources[{number}].stages are others than those of sources[0]")
    known = {source.name for source in manifest.sources}
    for number, domain in enumerate(manifest.guard_domains):
        check_types(domain, f"guard_domains[{number}]")
        unknown = sorted(set(domain.sources) - known)
        if unknown:
            raise ValueError(f"guard_domains[{number}].sources names {unknown}: no such source")
    for number, stock in enumerate(manifest.stock_text):
        check_types(stock, f"stock_text[{number}]")
    for name, inputs in manifest.inputs.items():
        check_types(inputs, f"inputs.{name}")
    for name, entry in manifest.files.items():
        check_types(entry, f"files.{name}")


def _guard_domain(content: dict[str, Any]) -> GuardDomain:
    values = dict(content)
    for key in ("sources", "ignored_keys", "served_by"):
        values[key] = tuple(content.get(key, ()))
    return GuardDomain(**values)


def _stock_text(content: dict[str, Any]) -> StockText:
    return StockText(**{**content, "examples": tuple(content["examples"])})


def _is_inside(name: str) -> bool:
    """Return whether a listed path stays inside the build."""
    parts = PurePosixPath(name).parts
    return bool(parts) and not name.startswith("/") and ".." not in parts and "\\" not in name

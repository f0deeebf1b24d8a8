"""The manifest of a build: what was made from which settings, and the hash of every file.

Decisions
    A build is complete if and only if its manifest is there and every listed file matches it; the
    manifest is written last and carries a checksum of itself.
    It holds no time, host or absolute path: equal input gives an equal manifest, byte for byte.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from data_pipeline.config.mix_config import GuardDomain
from data_pipeline.errors import DataError
from data_pipeline.store.files import atomic_write, sha256_of
from data_pipeline.store.shards import SUFFIX

FORMAT_VERSION = 4
FILE_NAME = "manifest.json"
_MAX_BYTES = 64 * 2**20


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry:
    """One file of the build."""

    bytes: int
    """Size."""
    sha256: str
    """Hex digest."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class SourceEntry:
    """One source of the build."""

    name: str
    language: str
    domain: str
    documents: int
    """Documents in training rows."""
    tokens: int
    """Tokens of those documents, END_OF_TEXT included."""
    predicted_tokens: int
    """Labels in training rows."""
    bytes: int
    """UTF-8 bytes of those documents."""
    rows: int
    """Training rows."""
    held_out_documents: int
    """Documents that are only ever measured."""
    held_out_rows: int
    """Rows of those documents."""
    held_out_tokens: int
    """Labels in those rows."""
    held_out_hash: str
    """Hex sha256 of those documents' content hashes, in the order of the hashes."""
    held_out_found: int
    """Held-out documents of which training text had a copy or a long run; that training text was
    dropped.
    """
    duplicates: int
    """Documents dropped as exact copies of another document of the mix."""
    near_duplicates: int
    """Documents dropped as near copies of another document of the mix."""
    contaminated: int
    """Documents dropped because they share a long run of tokens with a held-out document."""
    held_out_copies: int
    """Documents dropped because another source holds the same text out."""
    base_model: str
    """Hash of the model that wrote it (`self_replay.weights_hash`); empty: given text."""
    rejects: Mapping[str, int]
    """Unusable documents by reason."""
    notes: Mapping[str, int]
    """Oddities that cost no document."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class GuardSet:
    """The held-out text of one guard domain."""

    documents: int
    """Documents."""
    tokens: int
    """Predicted tokens."""
    found: int
    """Documents of which training text had a copy or a long run; that training text was dropped."""
    hash: str
    """Hex sha256 over the held-out documents of its sources."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Manifest:
    """A whole build."""

    format_version: int
    fingerprint: str
    """`build.fingerprint` of the mix and its input files."""
    tokenizer: str
    """Name of the tokenizer."""
    tokenizer_sha256: str
    """Of its ranks."""
    seq_len: int
    """Slots in a row."""
    sources: tuple[SourceEntry, ...]
    """In the order of the mix."""
    guard_domains: tuple[GuardDomain, ...]
    """As the mix had them at build time."""
    files: Mapping[str, FileEntry]
    """By path relative to the build."""

    def content(self) -> dict[str, Any]:
        """As JSON values, without the checksum."""
        return json.loads(json.dumps(dataclasses.asdict(self)))  # type: ignore[no-any-return]

    @property
    def hash(self) -> str:
        """Hex sha256 of the content; names the build."""
        return _checksum(self.content())

    def shard_names(self, source: str) -> list[str]:
        """Names of the token shards of a source within its folder, in order."""
        prefix = f"{source}/"
        names = (name.removeprefix(prefix) for name in self.files if name.startswith(prefix))
        return sorted(name for name in names if "/" not in name and name.endswith(SUFFIX))

    def guard_sets(self) -> dict[str, GuardSet]:
        """What is measured, by name of the guard domain."""
        entries = {source.name: source for source in self.sources}
        sets = {}
        for domain in self.guard_domains:
            members = [entries[name] for name in domain.sources]
            digest = hashlib.sha256(json.dumps([entry.held_out_hash for entry in members]).encode())
            sets[domain.name] = GuardSet(
                documents=sum(entry.held_out_documents for entry in members),
                tokens=sum(entry.held_out_tokens for entry in members),
                found=sum(entry.held_out_found for entry in members),
                hash=digest.hexdigest(),
            )
        return sets

    def row_hashes(self) -> dict[str, str]:
        """Hex sha256, by source, over the files that its training rows come from."""
        hashes = {}
        for source in self.sources:
            prefixes = (f"{source.name}/train/", f"{source.name}/documents")
            files = sorted(
                (name, entry.sha256)
                for name, entry in self.files.items()
                if name.startswith(prefixes)
            )
            hashes[source.name] = hashlib.sha256(json.dumps(files).encode()).hexdigest()
        return hashes

    def write(self, directory: Path) -> None:
        """Write `manifest.json`, atomically."""
        text = json.dumps({**self.content(), "checksum": self.hash}, indent=1, sort_keys=True)
        with atomic_write(directory / FILE_NAME) as file:
            file.write(text.encode("ascii") + b"\n")


def read_manifest(directory: Path) -> Manifest:
    """Read and check `manifest.json`.

    Raises:
        DataError: it is missing, damaged, of another format, or names a file outside the build.
    """
    path = directory / FILE_NAME
    try:
        if path.stat().st_size > _MAX_BYTES:
            raise DataError(f"{path}: {path.stat().st_size} bytes, more than any manifest has.")
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"{path}: cannot be read ({error.strerror}). The build is incomplete: build it again."
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{path}: not JSON. The build is damaged: delete it and build it again."
        ) from error
    if not isinstance(value, dict) or value.pop("checksum", None) != _checksum(value):
        raise DataError(
            f"{path}: does not match its own checksum. Delete the build and build it again."
        )
    if value.get("format_version") != FORMAT_VERSION:
        found = value.get("format_version")
        raise DataError(
            f"{path}: has format version {found}, this code reads {FORMAT_VERSION}. Build it again."
        )
    try:
        manifest = _from_content(value)
    except (TypeError, KeyError) as error:
        raise DataError(f"{path}: lacks or misnames a key: {error}. Build it again.") from error
    for name in manifest.files:
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\\" in name:
            raise DataError(f"{path}: lists '{name}', which is not a path inside the build.")
    return manifest


def check_files(directory: Path, manifest: Manifest, *, verify: bool) -> None:
    """Compare the files of a build with its manifest.

    Args:
        directory: the build.
        manifest: what it should hold.
        verify: compare the contents, not only names and sizes.

    Raises:
        DataError: naming every file that is missing, extra, a link, of another size or of other
            content.
    """
    found = {
        path.relative_to(directory).as_posix() for path in directory.rglob("*") if not path.is_dir()
    }
    problems = [f"{directory / name}: missing" for name in sorted(set(manifest.files) - found)]
    problems += [
        f"{directory / name}: not in the manifest"
        for name in sorted(found - {*manifest.files, FILE_NAME})
    ]
    for name in sorted(found & set(manifest.files)):
        path, entry = directory / name, manifest.files[name]
        if path.is_symlink() or not path.is_file():
            problems.append(f"{path}: not a plain file")
        elif path.stat().st_size != entry.bytes:
            problems.append(f"{path}: {path.stat().st_size} bytes, manifest says {entry.bytes}")
        elif verify and sha256_of(path) != entry.sha256:
            problems.append(f"{path}: content differs from the manifest (sha256)")
    if problems:
        raise DataError(
            "\n".join([*problems, "The build is damaged: delete it and build it again."])
        )


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(
        json.dumps(content, sort_keys=True, separators=(",", ":")).encode()
    ).hexdigest()


def _from_content(value: dict[str, Any]) -> Manifest:
    return Manifest(
        **{
            **value,
            "sources": tuple(SourceEntry(**source) for source in value["sources"]),
            "guard_domains": tuple(
                GuardDomain(**{**domain, "sources": tuple(domain["sources"])})
                for domain in value["guard_domains"]
            ),
            "files": {name: FileEntry(**entry) for name, entry in value["files"].items()},
        }
    )

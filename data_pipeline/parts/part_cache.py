"""Parts that builds share: made once, found again by what they are made of.

    unit, settings that touch it, versions -> key -> CACHE/parts/KE/KEY/
                                                        documents.tokens, hashes, ..., entry.json

Decisions
    A part is known by the content of its unit (the hash of each file, and the stretch) and by the
    settings and versions that decide its files. The name of the source, its place, its weight and
    all that a mix decides later do not belong to it. A setting that this module has never heard of
    belongs to it, so a new one is safe.
    An entry is a folder that is renamed into its place, so it is complete or absent. Its files are
    links to those of the build that made them, and builds link to them: they take space once.
    All files of an entry are hashed whenever it is used. Reading a shard costs a hundredth of
    making it, and a damaged file would otherwise get into every build from then on.
    Whatever is wrong with an entry, the part is made again. A cache that cannot be written is told,
    and costs only what it would have saved.
    Nobody else may look into the folder of a cache: what is in it goes into builds unread.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.bounded.files import open_regular
from data_pipeline.bounded.json_text import LARGE_BYTES, read_json
from data_pipeline.config.source_config import CLUSTER_PLACES, SourceConfig, suffix_format
from data_pipeline.parts.near_duplicates import NUM_HASHES, SHINGLE_TOKENS
from data_pipeline.parts.part import SHARD, VERSION, Account, Part, make_part
from data_pipeline.reading.clusters import KEY_RULES_VERSION
from data_pipeline.reading.document import COPIES_BY
from data_pipeline.reading.hooks import hook_rules
from data_pipeline.reading.record_fields import value_fields
from data_pipeline.reading.table_columns import VALUE_RULES_VERSION
from data_pipeline.store import shards
from data_pipeline.store.file_kinds import TEXT_KINDS_VERSION
from data_pipeline.store.files import (
    PARTIAL_SUFFIX,
    atomic_write,
    make_folder,
    sha256_of,
    sync_directory,
    write_json,
)
from data_pipeline.store.ownership import refuse_foreign
from data_pipeline.text.cleaning import MAX_DOCUMENT_BYTES, STEP_VERSIONS
from data_pipeline.text.conversation_reader import LOSS_RULES_VERSION
from data_pipeline.text.harmony_records import RULES_VERSION
from data_pipeline.text.tokenizer import RANKS_SHA256

ENTRY_FILE = "entry.json"
PARTS_FOLDER = "parts"
_VERSION = 1
_DECIDED_LATER = frozenset(
    {
        "name",
        "language",
        "domain",
        "path",
        "kind",
        "hook",  # its place; what it does is in the identity
        "weight",
        "epochs",
        "loss_weight",
        "held_out_share",
        "max_epochs",
    }
)
"""Fields of a source that decide nothing about the files of its parts."""
_NO_LINKS = (errno.EXDEV, errno.EPERM, errno.EMLINK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EACCES)
"""Errors of file systems, or between two of them, that cannot give a file another name."""

_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
"""Errors that say nothing about what is read."""
PRIVATE_FOLDER = 0o700
WHAT = "part cache"
"""The name of a cache in messages."""

Identity = dict[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class ProvidedPart:
    """A part that is there now."""

    num_tokens: int
    """Tokens in its shard."""
    is_reused: bool
    """Whether the cache had it."""
    problem: str = ""
    """What is wrong with the cache, for a person; empty if nothing is."""


def provide_part(part: Part) -> ProvidedPart:
    """Take a part from the cache, or make it and keep it there.

    Raises:
        DataError: the input cannot be used, or somebody writes to it.
        ConfigError: the cache, as this machine sees it, is not this user's alone.
        OSError: the part cannot be written.
    """
    if part.cache_dir is None or part.source.format == "mock":
        return ProvidedPart(num_tokens=make_part(part).num_tokens, is_reused=False)
    # who began the build has looked at all of it, but perhaps on another machine
    refuse_foreign(part.cache_dir, WHAT, folders=())
    problem = ""
    for identity in _identities(part):
        try:
            account = _take(part, identity)
        except _DamagedEntry as damage:
            problem = str(damage)
            continue
        if account is not None:
            return ProvidedPart(num_tokens=account.num_tokens, is_reused=True, problem=problem)
    account = make_part(part)
    problem = _keep(part, account) or problem
    return ProvidedPart(num_tokens=account.num_tokens, is_reused=False, problem=problem)


def entry_dir(cache_dir: Path, key: str) -> Path:
    """Return the folder of an entry."""
    return cache_dir / PARTS_FOLDER / key[:2] / key


def key_of(identity: Identity) -> str:
    """Return the name of the entry of a part: 64 hex digits."""
    return hashlib.sha256(_canonical(identity).encode()).hexdigest()


def _canonical(value: Any) -> str:
    return json.dumps(value, sort_keys=True, separators=(",", ":"))


def _identities(part: Part) -> Iterator[Identity]:
    """Yield what the part may be known by: for rows of any length first, then for those of the mix.

    The length of a row touches a part only if it leaves a conversation out.
    """
    identity = _identity(part)
    yield {**identity, "seq_len": None}
    if part.unit.format in ("harmony", "build"):
        yield {**identity, "seq_len": part.seq_len}


def _identity(part: Part) -> Identity:
    """Return all that decides the files of a part, as JSON values."""
    source = part.source
    identity = {
        "versions": [_VERSION, VERSION, shards.VERSION],
        "tokenizer": RANKS_SHA256,
        "max_document_bytes": MAX_DOCUMENT_BYTES,
        "source": _source_settings(source),
        "unit": [part.unit.format, part.unit.start, part.unit.stop],
        "files": _file_identities(part),
    }
    if source.format == "harmony":
        identity["conversation_rules"] = RULES_VERSION
        identity["copies_by"] = COPIES_BY
        if source.loss != "all":
            identity["loss_rules"] = LOSS_RULES_VERSION
    if source.hook is not None:
        identity["hook"] = hook_rules(source)
    if source.normalise:
        identity["step_versions"] = {step: STEP_VERSIONS.get(step) for step in source.normalise}
    if part.unit.format in ("parquet", "huggingface") and value_fields(source):
        identity["value_rules"] = VALUE_RULES_VERSION
    if part.unit.format == "text":
        identity["text_kinds"] = TEXT_KINDS_VERSION
    if part.near_duplicates:
        identity["signatures"] = [NUM_HASHES, SHINGLE_TOKENS]
    if source.cluster_by in CLUSTER_PLACES:
        identity["paths"] = [str(path) for path in part.unit.paths]
    elif source.cluster_by is not None:
        identity["cluster_rules"] = KEY_RULES_VERSION
    return json.loads(json.dumps(identity))  # type: ignore[no-any-return]


def _source_settings(source: SourceConfig) -> dict[str, Any]:
    """Return the settings of a source that are not their defaults, and not decided later."""
    values = dataclasses.asdict(source)
    settings = {}
    for field in dataclasses.fields(source):
        value = values[field.name]
        if field.name not in _DECIDED_LATER and value != field.default:
            settings[field.name] = value
    return settings


def _file_identities(part: Part) -> list[Any]:
    """Return the hash of each file that the unit is read from, and what its name decides."""
    if part.unit.paths and part.unit.paths[0] not in {file.path for file in part.inputs}:
        folder = part.unit.paths[0]
        # of a dataset or earlier build: files of one name lie in several folders of it
        return [[str(file.path.relative_to(folder)), file.content_hash] for file in part.inputs]
    if not part.unit.paths:
        return []  # a dataset of the Hub, which its commit names
    identities = []
    for file in part.inputs:
        suffix = suffix_format(file.path) if part.unit.format == "text" else None
        identities.append([file.content_hash, suffix])
    return identities


class _DamagedEntry(Exception):
    """An entry that is not what was written; the message is for a person."""


def _take(part: Part, identity: Identity) -> Account | None:
    """Put the files of an entry in the place of those of a part, and return its account.

    Returns:
        None if there is no such entry, or if its conversations do not fit the rows.

    Raises:
        _DamagedEntry: the entry was not what was written; it is no longer there.
        OSError: the files of the part cannot be written.
    """
    entry = entry_dir(_cache_of(part), key_of(identity))
    make_folder(part.shard_path.parent)
    make_folder(part.account_path.parent)
    try:
        content = _read_entry(entry, identity)
        account = Account.from_json(_moved_account(content, part))
        if account.longest_conversation > part.seq_len:
            return None
        _take_files(part, entry, content["files"])
    except FileNotFoundError:
        if (entry / ENTRY_FILE).exists():
            _remove(entry)
            raise _DamagedEntry(f"{entry}: a file is missing; the part is made again") from None
        return None  # never there, or pruned since
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno in _OF_WRITING:
            raise
        _remove(entry)
        reason = str(error)
        if isinstance(error, OSError):
            reason = error.strerror or reason
        raise _DamagedEntry(f"{entry}: damaged ({reason}); the part is made again") from None
    write_json(part.account_path, account.to_json())
    with contextlib.suppress(OSError):
        os.utime(entry / ENTRY_FILE)  # the time of its last use, by which a cache is pruned
    return account


def _cache_of(part: Part) -> Path:
    assert part.cache_dir is not None, "provide_part asks for no entry without a cache"
    return part.cache_dir


def _read_entry(entry: Path, identity: Identity) -> dict[str, Any]:
    """Return the content of an entry's own file.

    Raises:
        ValueError: it is damaged, or that of another part.
    """
    # it names input files, whose names may be no Unicode
    content = read_json(entry / ENTRY_FILE, LARGE_BYTES, lone_surrogates=True, follow_links=False)
    if not isinstance(content, dict):
        raise ValueError(f"{ENTRY_FILE} is no object")
    checksum = content.pop("checksum", None)
    if checksum != key_of(content):
        raise ValueError(f"{ENTRY_FILE} does not match its checksum")
    if content["identity"] != identity:
        raise ValueError("it is the entry of another part")
    return content


def _moved_account(content: Mapping[str, Any], part: Part) -> dict[str, Any]:
    """Return the account of an entry; places name the files where they lie now."""
    account: dict[str, Any] = content["account"]
    before = content["paths"]
    now = [str(path) for path in part.unit.paths]
    if before == now:
        return account
    for places in account["tally"]["places"].values():
        for place in places:
            place["text"] = _moved(place["text"], before, now)
    return account


def _moved(text: str, before: list[str], now: list[str]) -> str:
    for old, new in zip(before, now, strict=True):
        if text == old or text.startswith(f"{old}: "):
            return new + text[len(old) :]
    return text


def _take_files(part: Part, entry: Path, files: Mapping[str, Any]) -> None:
    """Link the files of an entry to those of a part, each one hashed under its new name.

    Raises:
        ValueError: a file is not the one that was kept, or the names are not those of a part.
        OSError: a file is missing, or cannot be written.
    """
    paths = part.file_paths()
    no_shard = set(paths) - {SHARD}
    if set(files) not in (set(paths), no_shard):
        raise ValueError(f"its files are not those of a part: {', '.join(sorted(files))}")
    part.shard_path.unlink(missing_ok=True)
    for name, facts in files.items():
        path = paths[name]
        temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}{PARTIAL_SUFFIX}")
        try:
            link_or_copy(entry / name, temporary)
            if temporary.stat().st_size != facts["bytes"]:
                raise ValueError(f"{name} has another size than it had")
            if sha256_of(temporary) != facts["sha256"]:
                raise ValueError(f"{name} has other content than it had")
            path.unlink(missing_ok=True)  # renaming does nothing between two names of one file
            temporary.rename(path)
        finally:
            temporary.unlink(missing_ok=True)


def _keep(part: Part, account: Account) -> str:
    """Add a part to the cache; return what is wrong if that is not possible."""
    seq_len = part.seq_len if account.left_out_conversations else None
    identity = {**_identity(part), "seq_len": seq_len}
    entry = entry_dir(_cache_of(part), key_of(identity))
    temporary = _leftover_name(entry)
    try:
        make_folder(_cache_of(part), PRIVATE_FOLDER)
        make_folder(temporary)
        content = {
            "identity": identity,
            "paths": [str(path) for path in part.unit.paths],
            "account": account.to_json(),
            "files": _keep_files(part, account, temporary),
        }
        content = json.loads(json.dumps(content))
        write_json(temporary / ENTRY_FILE, {**content, "checksum": key_of(content)})
        if not (entry / ENTRY_FILE).exists():
            shutil.rmtree(entry, ignore_errors=True)  # what is left of a removed entry
        temporary.rename(entry)
        sync_directory(entry.parent)
    except OSError as error:
        if error.errno in (errno.EEXIST, errno.ENOTEMPTY):
            return ""  # another build was faster
        return (
            f"{_cache_of(part)}: parts cannot be kept for other builds ({error.strerror}); this "
            "build goes on without"
        )
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return ""


def _keep_files(part: Part, account: Account, folder: Path) -> dict[str, dict[str, Any]]:
    """Link the files of a part into a folder; return size and hash of each."""
    files = {}
    for name, path in part.file_paths().items():
        is_shard = path == part.shard_path
        if is_shard and not account.num_documents:
            continue
        link_or_copy(path, folder / name)
        sha256 = account.shard_sha256 if is_shard else sha256_of(folder / name)
        files[name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256}
    return files


def link_or_copy(source: Path, target: Path) -> None:
    """Give a file of this user another name; copy it where that is not possible.

    Raises:
        OSError: the file is missing, a link or no regular file, or the other one cannot be written.
    """
    status = source.lstat()
    # a link can have another name as well; open_regular says what is wrong with it
    if stat.S_ISREG(status.st_mode) and status.st_uid == os.geteuid():
        try:
            os.link(source, target, follow_symlinks=False)
            return
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
    with open_regular(source, follow_links=False) as file, atomic_write(target) as copy:
        shutil.copyfileobj(file, copy)


def _remove(entry: Path) -> None:
    """Take a damaged entry away, whatever it is; all of it at once, so nobody takes half of it.

    What cannot be deleted is left under a name of leftovers.
    """
    leftover = _leftover_name(entry)
    try:
        entry.rename(leftover)
    except OSError:
        return
    if leftover.is_dir() and not leftover.is_symlink():
        shutil.rmtree(leftover, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            leftover.unlink()


def _leftover_name(entry: Path) -> Path:
    """Return a name for what is not an entry yet, or no longer."""
    return entry.with_name(f".{entry.name[:16]}.{secrets.token_hex(8)}{PARTIAL_SUFFIX}")

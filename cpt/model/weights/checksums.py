"""SHA-256 of weight files, which finds damage that no check of the format can see.

Two places know the right value: a file `SHA256SUMS` in the directory (as `sha256sum *.safetensors`
writes it), and the cache of the Hugging Face Hub, whose files are links to blobs named by their
hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path

from cpt.errors import ConfigError
from cpt.model.weights.hf_layout import open_tensors
from data_pipeline.bounded.files import MalformedInput, open_regular, read_small_text
from data_pipeline.console.progress import show_progress
from data_pipeline.store.files import AtChunk, no_call, sha256_of, write_text

SUMS_FILE = "SHA256SUMS"
SAMPLED_BLOCKS = 64
SAMPLED_BLOCK_BYTES = 2**16
TENSOR_HASH_PREFIX = "tensors:"
"""Beginning of what `tensor_hash` returns."""
WHOLE_TENSOR_BYTES = 2**20
"""Tensors up to this size are hashed whole: norms, sinks, routers, and most biases."""
TENSOR_BLOCKS = 32
"""Blocks of a larger tensor, one for each expert of gpt-oss-20b."""
TENSOR_BLOCK_BYTES = 2**14
_HASH = re.compile(r"[0-9a-f]{64}")


def sampled_hash(files: Iterable[Path]) -> str:
    """Return a hash of weight files by name, size and `SAMPLED_BLOCKS` blocks of each.

    It does not see small tensors, which lie between the blocks: `tensor_hash` does. Files that were
    written before that know their model by it.

    Raises:
        ConfigError: a file cannot be read, or is no regular file.
    """
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        try:
            _hash_samples(file, digest)
        except OSError as error:
            raise ConfigError(
                f"{file}: cannot be read ({error.strerror or error}). Fetch it again."
            ) from error
    return digest.hexdigest()


def _hash_samples(file: Path, digest: hashlib._Hash) -> None:
    """Add a file's name, size and samples to a hash."""
    with open_regular(file) as opened:
        size = os.fstat(opened.fileno()).st_size
        digest.update(f"{file.name}:{size}:".encode())
        starts = {size * block // SAMPLED_BLOCKS for block in range(SAMPLED_BLOCKS)}
        for start in sorted(starts):
            opened.seek(start)
            digest.update(opened.read(SAMPLED_BLOCK_BYTES))


def tensor_hash(files: Iterable[Path]) -> str:
    """Return a hash of files of a model by name and content.

    Of safetensors files the header counts and samples of every tensor: one of up to
    `WHOLE_TENSOR_BYTES` is hashed whole, a larger one by `TENSOR_BLOCKS` blocks. This tells one set
    of weights from another without reading tens of GiB; damage to single values is for `damaged` to
    find. Other files are hashed whole.

    Raises:
        ConfigError: a file cannot be read, or is no whole safetensors file.
    """
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        of_tensors = file.suffix == ".safetensors"
        if of_tensors:
            with open_tensors(file):
                pass  # the header is whole, and the file has all bytes that it names
        try:
            if of_tensors:
                _hash_tensors(file, digest)
            else:
                digest.update(f"{file.name}:{sha256_of(file)}:".encode())
        except OSError as error:
            raise ConfigError(
                f"{file}: cannot be read ({error.strerror or error}). Fetch it again."
            ) from error
    return TENSOR_HASH_PREFIX + digest.hexdigest()


def _hash_tensors(file: Path, digest: hashlib._Hash) -> None:
    """Add the name, the header and samples of the tensors of a safetensors file to a hash."""
    with open_regular(file) as opened:
        length = opened.read(8)
        header = opened.read(int.from_bytes(length, "little"))
        digest.update(f"{file.name}:".encode() + length + header)
        ranges = []
        for name, entry in json.loads(header).items():
            if name != "__metadata__":
                ranges.append(entry["data_offsets"])
        for begin, end in sorted(ranges):
            for start, stop in _tensor_blocks(end - begin):
                opened.seek(8 + len(header) + begin + start)
                digest.update(opened.read(stop - start))


def _tensor_blocks(size: int) -> list[tuple[int, int]]:
    """Return the ranges of bytes by which a tensor of this size is known, its end included."""
    if size <= WHOLE_TENSOR_BYTES:
        return [(0, size)]
    blocks = []
    for block in range(TENSOR_BLOCKS):
        start = (size - TENSOR_BLOCK_BYTES) * block // (TENSOR_BLOCKS - 1)
        blocks.append((start, start + TENSOR_BLOCK_BYTES))
    return blocks


def weights_identity(files: Iterable[Path]) -> str:
    """Return what files of a model are known by: `tensor_hash`, a plus sign, and `sampled_hash`.

    Raises:
        ConfigError: see `tensor_hash`.
    """
    files = list(files)
    return f"{tensor_hash(files)}+{sampled_hash(files)}"


def is_identity(stated: object, identity: object) -> bool:
    """Return whether a file states these weights.

    Args:
        stated: What it states: a `weights_identity`, or, if it was written before there were any,
            a `sampled_hash`.
        identity: `weights_identity` of the weights; any other value has to be stated as it is.
    """
    if stated == identity:
        return True
    if not isinstance(identity, str) or not identity.startswith(TENSOR_HASH_PREFIX):
        return False
    return stated == identity.partition("+")[2]


def hash_of_sums(path: Path, files: Iterable[Path]) -> str | None:
    """Return a hash of the names and known SHA-256 of weight files; None if not all are known.

    Raises:
        ConfigError: see `known_sums`.
    """
    files = sorted(files)
    sums = known_sums(path, files)
    if len(sums) != len(files):
        return None
    lines = [f"{sums[file]}  {file.name}\n" for file in files]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def model_hash(path: Path, files: Iterable[Path] | None = None) -> str:
    """Return the `weights_identity` of a model's weight files and configuration.

    Args:
        path: A Hugging Face directory.
        files: Its weight files; None takes all `*.safetensors`.

    Raises:
        ConfigError: there are no weight files or no config.json.
    """
    weights = set(path.glob("*.safetensors") if files is None else files)
    config = path / "config.json"
    if not weights or not config.is_file():
        missing = "*.safetensors" if config.is_file() else "config.json"
        raise ConfigError(
            f"{path} is no Hugging Face directory: it has no {missing}. Name the directory that "
            "holds the weights."
        )
    return weights_identity(weights | {config})


def known_sums(path: Path, files: Iterable[Path]) -> dict[Path, str]:
    """Return the SHA-256 that each file should have; a file without a known one is left out.

    Raises:
        ConfigError: SHA256SUMS is there and cannot be read, or leaves out one of the files.
    """
    files = sorted(files)
    listed = path / SUMS_FILE
    if not listed.is_file():
        return _sums_of_links(files)
    sums: dict[str, str] = {}
    try:
        text = read_small_text(listed)
    except (OSError, MalformedInput) as error:
        raise ConfigError(
            f"{listed}: cannot be read ({error}). Write it anew or remove it."
        ) from error
    for number, line in enumerate(text.splitlines(), start=1):
        value, _, name = line.partition(" ")
        if not _HASH.fullmatch(value) or not name.strip():
            raise ConfigError(f"{listed}:{number}: is not '<sha256>  <file name>'.")
        sums[name.strip().removeprefix("*")] = value
    missing = [file.name for file in files if file.name not in sums]
    if missing:
        raise ConfigError(
            f"{listed}: does not list {', '.join(missing)}. Write it anew or remove it."
        )
    return {file: sums[file.name] for file in files}


def _sums_of_links(files: list[Path]) -> dict[Path, str]:
    """Return the sums that the cache of the Hugging Face Hub uses as names of its blobs."""
    sums = {}
    for file in files:
        blob = file.resolve().name
        if file.is_symlink() and _HASH.fullmatch(blob):
            sums[file] = blob
    return sums


def write_sums(path: Path, names: Iterable[str], at_chunk: AtChunk = no_call) -> None:
    """Write the SHA256SUMS of the files of these names in a directory.

    Args:
        path: The directory.
        names: Names of the files.
        at_chunk: Called after each file.
    """
    lines = []
    for name in sorted(names):
        lines.append(f"{sha256_of(path / name)}  {name}\n")
        at_chunk()
    write_text(path / SUMS_FILE, "".join(lines))


def damaged(sums: dict[Path, str], mine: Iterable[Path]) -> list[str]:
    """Return a problem for each of the files whose SHA-256 is not the expected one."""
    problems = []
    sizes = {file: file.stat().st_size for file in mine}
    total = sum(sizes.values())
    with show_progress(total, "SHA-256 of weights", "B", unit_scale=True, leave=False) as bar:
        for file, size in sizes.items():
            found = sha256_of(file)
            bar.update(size)
            if found != sums[file]:
                problems.append(
                    f"{file}: SHA-256 is {found}, expected {sums[file]}. The file is damaged; "
                    "fetch it again."
                )
    return problems

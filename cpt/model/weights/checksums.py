"""SHA-256 of weight files, where the directory says what it should be: damage that no format check
can see.

Two places know the right value: a file `SHA256SUMS` in the directory (as `sha256sum *.safetensors`
writes it), and the cache of the Hugging Face Hub, whose files are links to blobs named by their
hash.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

from cpt.errors import ConfigError
from data_pipeline.store.files import sha256_of, write_text

SUMS_FILE = "SHA256SUMS"
SAMPLED_BLOCKS, SAMPLED_BLOCK_BYTES = 64, 2**16
_HASH = re.compile(r"[0-9a-f]{64}")


def sampled_hash(files: Iterable[Path]) -> str:
    """Hash of weight files by name, size and `SAMPLED_BLOCKS` blocks of each, the header among
    them.

    Tells one training state from another without reading tens of GiB; damage of single values is
    for `damaged`.
    """
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda file: file.name):
        size = file.stat().st_size
        digest.update(f"{file.name}:{size}:".encode())
        with open(file, "rb") as opened:
            for start in sorted(
                {size * block // SAMPLED_BLOCKS for block in range(SAMPLED_BLOCKS)}
            ):
                opened.seek(start)
                digest.update(opened.read(SAMPLED_BLOCK_BYTES))
    return digest.hexdigest()


def known_sums(path: Path, files: Iterable[Path]) -> dict[Path, str]:
    """File -> the SHA-256 it should have; files of which nobody knows are left out.

    Raises:
        ConfigError: SHA256SUMS is there and cannot be read, or leaves out one of the files.
    """
    files = sorted(files)
    listed = path / SUMS_FILE
    if not listed.is_file():
        linked = {file: file.resolve().name for file in files if file.is_symlink()}
        return {file: name for file, name in linked.items() if _HASH.fullmatch(name)}
    sums: dict[str, str] = {}
    for number, line in enumerate(listed.read_text(encoding="utf-8").splitlines(), start=1):
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


def write_sums(path: Path, names: Iterable[str]) -> None:
    """Write SHA256SUMS of files in a directory."""
    lines = [f"{sha256_of(path / name)}  {name}\n" for name in sorted(names)]
    write_text(path / SUMS_FILE, "".join(lines))


def damaged(sums: dict[Path, str], mine: Iterable[Path]) -> list[str]:
    """A problem for each of the files whose SHA-256 is another."""
    found = {file: sha256_of(file) for file in mine}
    return [
        f"{file}: SHA-256 is {value}, expected {sums[file]}. The file is damaged; fetch it again."
        for file, value in found.items()
        if value != sums[file]
    ]

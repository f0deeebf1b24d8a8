"""Parts of a build whose hashes and signatures are given, without text, for the last stage."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_pipeline.config.source_config import SourceConfig
from data_pipeline.parts.near_duplicates import Signatures
from data_pipeline.parts.part import Account, Part
from data_pipeline.parts.source_parts import SourceParts
from data_pipeline.reading.content_hashes import Hashes
from data_pipeline.reading.units import Unit
from data_pipeline.text.cleaning import Tally


def write_source(
    work_dir: Path,
    name: str,
    hashes: Sequence[Hashes],
    signatures: Sequence[Signatures] | None = None,
    *,
    is_mock: bool = False,
) -> SourceParts:
    """Write the parts of a source.

    Args:
        work_dir: Folder of the build in progress.
        name: Name of the source.
        hashes: Content hashes of each part.
        signatures: Signatures of each part.
        is_mock: Whether the documents are invented.
    """
    counts = [len(values) for values in hashes]
    gathered = source_of_arrays(
        work_dir, name, counts, has_signatures=signatures is not None, is_mock=is_mock
    )
    for number, part in enumerate(gathered.parts):
        part.hashes_path.parent.mkdir(parents=True, exist_ok=True)
        with part.hashes_path.open("wb") as file:
            np.save(file, hashes[number])
        if signatures is not None:
            with part.signatures_path.open("wb") as file:
                np.save(file, signatures[number])
    return gathered


def source_of_arrays(
    work_dir: Path,
    name: str,
    counts: Sequence[int],
    *,
    has_signatures: bool = True,
    is_mock: bool = False,
) -> SourceParts:
    """Return a source whose parts have `counts` documents; their files are written apart."""
    source = SourceConfig(
        name=name,
        language="en",
        domain="web",
        path=None if is_mock else "absent.jsonl",
        format="mock" if is_mock else "jsonl",
        weight=1.0,
    )
    parts = []
    for number in range(len(counts)):
        part = Part(
            source=source,
            unit=Unit(format=source.format, size_bytes=1),
            number=number,
            work_dir=work_dir,
            near_duplicates=has_signatures,
            seq_len=8,
        )
        parts.append(part)
    return SourceParts(
        source=source,
        parts=parts,
        accounts=[_account_of(count) for count in counts],
        lines_before=[0] * len(parts),
        tally=Tally(),
        num_duplicates=0,
        num_duplicate_tokens=0,
    )


def _account_of(num_documents: int) -> Account:
    return Account(
        tally=Tally(),
        num_documents=num_documents,
        num_tokens=2 * num_documents,
        num_duplicates=0,
        num_duplicate_tokens=0,
        shard_bytes=0,
        shard_sha256="",
    )

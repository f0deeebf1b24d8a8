"""Sources that are stored by row: Hugging Face datasets, and earlier builds of this package.

Decisions
    A dataset from the hub is named with a commit, so the text cannot change under a run; one on
    disk is a folder that `datasets.save_to_disk` made.
    An earlier build gives its training documents, decoded; what it held out stays out.  Decoding is
    exact, so cleaning, hashing and cutting work as for any other text.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.config.source_config import SourceConfig
from data_pipeline.errors import DataError
from data_pipeline.store.manifest import read_manifest
from data_pipeline.store.shards import Shards
from data_pipeline.text.tokenizer import decode_bytes

_BATCH_ROWS = 256


def count_rows(source: SourceConfig) -> tuple[int, int]:
    """(rows or documents, bytes) of a source.

    Raises:
        DataError: the dataset or build cannot be read.
    """
    if source.format == "build":
        parts = _build_documents(Path(source.patterns()[0]), source.build_sources)
        return sum(len(documents) for _, documents in parts), sum(
            int(shards.document_bytes[documents].sum()) for shards, documents in parts
        )
    dataset = _dataset(source)
    return len(dataset), int(dataset.data.nbytes)


def read_dataset(
    source: SourceConfig, start: int, stop: int, fields: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """Rows [start, stop), each with `fields`.

    Raises:
        DataError: the dataset lacks a column.
    """
    dataset = _dataset(source)
    missing = [field for field in fields if field not in dataset.column_names]
    if missing:
        raise DataError(
            f"source '{source.name}': the dataset has no column '{missing[0]}'. It has: "
            f"{', '.join(dataset.column_names)}. Set text_field or template."
        )
    chosen = dataset.select_columns(list(fields))
    for first in range(start, stop, _BATCH_ROWS):
        columns = chosen[first : min(first + _BATCH_ROWS, stop)]
        for values in zip(*(columns[field] for field in fields), strict=True):
            yield dict(zip(fields, values, strict=True))


def read_build(source: SourceConfig, start: int, stop: int) -> Iterator[bytes]:
    """UTF-8 text of documents [start, stop), counted through the sources that are taken."""
    before = 0
    for shards, documents in _build_documents(Path(source.patterns()[0]), source.build_sources):
        for number in documents[max(start - before, 0) : max(stop - before, 0)].tolist():
            yield decode_bytes(shards.tokens(number, 0, int(shards.document_tokens[number]) - 1))
        before += len(documents)


@functools.lru_cache(maxsize=8)
def _build_documents(directory: Path, names: tuple[str, ...]) -> list[tuple[Shards, Any]]:
    """(documents, numbers of those trained on) of each source that is taken from a build."""
    manifest = read_manifest(directory)
    known = [entry.name for entry in manifest.sources]
    unknown = [name for name in names if name not in known]
    if unknown:
        raise DataError(
            f"{directory}: has no source '{unknown[0]}'. It has: {', '.join(known)}. Set build_sources."
        )
    parts = []
    for name in names or known:
        shards = Shards(directory / name, manifest.shard_names(name), verify=False)
        if shards.chat:
            raise DataError(
                f"{directory}: source '{name}' holds conversations (format: harmony), which cannot be taken as text. "
                "List the other sources in build_sources, and take the conversations from their own files."
            )
        parts.append(
            (shards, np.unique(np.load(directory / name / "train" / "piece_document.npy")))
        )
    return parts


def _dataset(source: SourceConfig) -> Any:
    return _open_dataset(
        source.patterns() or None, source.dataset, source.revision, source.subset, source.split
    )


@functools.lru_cache(maxsize=8)
def _open_dataset(
    path: tuple[str, ...] | None,
    name: str | None,
    revision: str | None,
    subset: str | None,
    split: str,
) -> Any:
    import datasets

    place = path[0] if path else f"{name} at {revision}"
    try:
        if path:
            loaded = datasets.load_from_disk(path[0])
            if isinstance(loaded, datasets.DatasetDict):
                loaded = loaded[split]
        else:
            assert name is not None
            loaded = datasets.load_dataset(name, subset, split=split, revision=revision)
    except (
        Exception
    ) as error:  # `datasets` raises whatever the hub, the file system or the builder raises
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"{place}: cannot be read as a Hugging Face dataset, split '{split}': {reason}."
        ) from error
    return loaded

"""What a worker holds does not grow with the unit that it reads."""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.config.source_config import SourceConfig
from data_pipeline.parts import document_facts
from data_pipeline.parts.near_duplicates import NUM_HASHES, Signatures, minhash_signatures
from data_pipeline.parts.part import Part, make_part
from data_pipeline.reading.sources import read_documents
from data_pipeline.reading.units import Unit
from data_pipeline.text.cleaning import Tally
from tests.data_pipeline.inputs import write_jsonl

MOST_BYTES = 48
"""Bytes a document that memory may grow by: a shard keeps 16 and copies 8 of them at its end.
Signatures alone took 1,024 when they were joined at the end."""


def part_of(folder: Path, num_documents: int) -> Part:
    """Return a part of short texts with signatures."""
    texts = [f"{number * 7919} {number}" for number in range(num_documents)]
    path = write_jsonl(folder / "en.jsonl", texts)
    source = SourceConfig(name="en", language="en", domain="web", path=str(path), weight=1.0)
    size_bytes = path.stat().st_size
    return Part(
        source=source,
        unit=Unit(paths=(path,), format="jsonl", stop=size_bytes, size_bytes=size_bytes),
        number=0,
        work_dir=folder / "work",
        near_duplicates=True,
        seq_len=64,
    )


def peak_bytes(part: Part) -> int:
    """Return the most memory that the making of a part takes, in bytes."""
    tracemalloc.start()
    try:
        make_part(part)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def read_signatures(part: Part) -> Signatures:
    """Return the signatures of a part that is made."""
    return np.asarray(np.load(part.signatures_path))


@pytest.fixture
def few_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let few documents wait to be written, or be remembered, so that small units show a slope."""
    monkeypatch.setattr(document_facts, "MAX_SEEN", 64)
    monkeypatch.setattr(document_facts, "SIGNATURE_TOKENS", 512)
    monkeypatch.setattr(document_facts, "_WAITING_NUMBERS", 64)


@pytest.mark.usefixtures("few_wait")
def test_memory_of_a_worker_does_not_grow_with_the_unit(tmp_path: Path) -> None:
    small = part_of(tmp_path / "small", 200)
    large = part_of(tmp_path / "large", 1000)
    make_part(small)  # what stays is there now
    growth = peak_bytes(large) - peak_bytes(small)
    assert read_signatures(large).shape == (1000, NUM_HASHES)
    assert growth < MOST_BYTES * 800, f"{growth / 800:.0f} bytes a document"


@pytest.mark.usefixtures("few_wait")
def test_signatures_written_in_pieces_are_those_of_the_whole_unit(tmp_path: Path) -> None:
    part = part_of(tmp_path, 300)
    make_part(part)
    tokens = [document.tokenize() for document in read_documents(part.source, part.unit, Tally())]
    found = read_signatures(part)
    assert found.dtype == np.dtype("<u4")
    assert np.array_equal(found, minhash_signatures(tokens))

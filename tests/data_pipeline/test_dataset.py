"""A row is what the model sees: inputs, labels, positions and boundaries agree."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.build.build import build
from data_pipeline.config.mix_config import GuardDomain, MixConfig
from data_pipeline.dataset import IGNORED_LABEL, BuiltData, PackedRow
from data_pipeline.errors import DataError
from data_pipeline.text.tokenizer import END_OF_TEXT
from tests.data_pipeline.inputs import MakeMix, make_texts

SEQ_LEN = 32


@pytest.fixture
def mix(make_mix: MakeMix) -> MixConfig:
    texts = {
        "ja_a": make_texts(30, "a"),
        "ja_b": make_texts(20, "bb"),
        "en": make_texts(40, "ccc", 8),
    }
    guard = {"domains": [{"name": "japanese", "language": "ja", "sources": ["ja_a", "ja_b"]}]}
    return make_mix(texts, seq_len=SEQ_LEN, held_out_share=0.3, guard=guard)


@pytest.fixture
def built(mix: MixConfig, tmp_path: Path) -> BuiltData:
    build(mix, tmp_path / "out", progress=False)
    return BuiltData.open(tmp_path / "out")


def all_rows(built: BuiltData) -> list[PackedRow]:
    rows = []
    for source in range(len(built.source_names)):
        for row in range(built.num_rows(source)):
            rows.append(built.read_row(source, row))
    for domain in built.held_out:
        for row in range(domain.num_rows):
            rows.append(domain.read_row(row))
    return rows


def test_rows_have_the_promised_shape(built: BuiltData) -> None:
    for row in all_rows(built):
        for values in (row.input_ids, row.labels, row.position_ids):
            assert values.shape == (SEQ_LEN,) and values.dtype == np.int64
        assert row.bounds[0] == 0
        assert row.bounds[-1] == SEQ_LEN
        assert row.bounds == sorted(set(row.bounds))
        padded = int(row.labels[-1] == IGNORED_LABEL)
        assert len(row.bounds) == len(row.documents) + 1 + padded


def test_labels_are_the_next_token_and_never_cross_a_document(built: BuiltData) -> None:
    for row in all_rows(built):
        for begin, end in zip(row.bounds[: len(row.documents)], row.bounds[1:], strict=False):
            assert np.array_equal(row.labels[begin : end - 1], row.input_ids[begin + 1 : end])
            assert not (row.labels[begin : end - 1] == END_OF_TEXT).any()


def test_end_of_text_is_a_label_and_an_input_only_in_padding(built: BuiltData) -> None:
    for row in all_rows(built):
        padding = row.labels == IGNORED_LABEL
        start_of_padding = row.bounds[len(row.documents)]
        assert np.array_equal(row.input_ids == END_OF_TEXT, padding)
        assert not padding[:start_of_padding].any()
        assert padding[start_of_padding:].all()


def test_positions_restart_at_every_document_and_at_the_padding(built: BuiltData) -> None:
    for row in all_rows(built):
        counted = np.concatenate([np.arange(length) for length in np.diff(row.bounds)])
        assert np.array_equal(row.position_ids, counted)


def test_predicted_tokens_of_a_row_are_its_labels(built: BuiltData) -> None:
    for source in range(len(built.source_names)):
        counted = []
        for row in range(built.num_rows(source)):
            labels = built.read_row(source, row).labels
            counted.append(np.count_nonzero(labels != IGNORED_LABEL))
        assert built.row_tokens(source).tolist() == counted


def test_a_row_out_of_range_is_an_index_error(built: BuiltData) -> None:
    for row in (-1, built.num_rows(0)):
        with pytest.raises(IndexError, match="source 'ja_a' has"):
            built.read_row(0, row)
    with pytest.raises(IndexError, match="held-out set 'japanese' has"):
        built.held_out[0].read_row(built.held_out[0].num_rows)


def test_held_out_documents_are_numbered_through_their_domain(built: BuiltData) -> None:
    (domain,) = built.held_out
    assert (domain.name, domain.language, domain.sources) == ("japanese", "ja", ("ja_a", "ja_b"))
    tokens = np.zeros(domain.num_documents, dtype=np.int64)
    for number in range(domain.num_rows):
        row = domain.read_row(number)
        np.add.at(tokens, row.documents, np.diff(row.bounds)[: len(row.documents)])
    entries = built.manifest.sources[:2]
    assert domain.num_documents == sum(entry.held_out_documents for entry in entries)
    assert (tokens >= 1).all()
    assert (domain.document_bytes >= tokens).all()


def test_held_out_documents_can_be_packed_alone(built: BuiltData) -> None:
    """Tokens are those of the build's own rows, whatever else lies in them."""
    (domain,) = built.held_out
    in_build: dict[int, list[int]] = {}
    pieces = [domain.read_row(number) for number in range(domain.num_rows)]
    for row in pieces:
        for index, document in enumerate(row.documents.tolist()):
            span = slice(row.bounds[index], row.bounds[index + 1])
            in_build.setdefault(document, []).extend(row.labels[span].tolist())
    chosen = np.array([domain.num_documents - 1, 0])
    packed = domain.pack(chosen)
    alone: dict[int, list[int]] = {}
    for number in range(packed.num_rows):
        row = packed.read_row(number)
        assert row.input_ids.shape == (SEQ_LEN,)
        for index, position in enumerate(row.documents.tolist()):
            span = slice(row.bounds[index], row.bounds[index + 1])
            document = int(chosen[position])
            alone.setdefault(document, []).extend(row.labels[span].tolist())
    assert alone.keys() == set(chosen.tolist())
    for document, labels in alone.items():
        assert sorted(labels) == sorted(in_build[document])
        assert len(labels) == domain.document_tokens[document] - 1


def test_labels_and_guard_domains_of_the_present_mix_replace_those_of_the_build(
    mix: MixConfig, built: BuiltData
) -> None:
    domain = GuardDomain(name="english", language="en", sources=("en",))
    sources = tuple(dataclasses.replace(source, domain="books") for source in mix.sources)
    guard = dataclasses.replace(mix.guard, domains=(domain,))
    changed = dataclasses.replace(mix, sources=sources, guard=guard)
    again = BuiltData.open(built.directory, mix=changed)
    assert [held.name for held in again.held_out] == ["english"]
    assert again.domains == ("books",) * 3
    with pytest.raises(DataError, match="built for seq_len 32"):
        BuiltData.open(built.directory, mix=dataclasses.replace(mix, seq_len=64))


def test_rows_that_leave_their_document_are_refused_even_without_hashing(built: BuiltData) -> None:
    path = built.directory / "en" / "train" / "piece_start.npy"
    values = np.load(path)
    values[0] += 1000
    np.save(path, values)
    with pytest.raises(DataError, match="row arrays do not fit the documents"):
        BuiltData.open(built.directory, verify=False)


def test_rows_whose_end_wraps_around_are_refused(built: BuiltData) -> None:
    path = built.directory / "en" / "train" / "piece_start.npy"
    values = np.load(path)
    values[0] = 2**63 - 1
    np.save(path, values)
    with pytest.raises(DataError, match="row arrays do not fit the documents"):
        BuiltData.open(built.directory, verify=False)

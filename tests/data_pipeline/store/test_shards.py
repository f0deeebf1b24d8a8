"""A token shard is whole, or opening it is a DataError that names the file (B10)."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.store.shards import HEADER_BYTES, Shard, Shards, write_shard
from data_pipeline.text.tokenizer import END_OF_TEXT, VOCAB_SIZE

DOCUMENTS = [[1, 2, 3], [4], [5, 6]]
NUM_TOKENS = 9
OFFSETS_AT = HEADER_BYTES + 4 * NUM_TOKENS + 4


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "documents.tokens"
    with write_shard(path) as shard:
        for number, tokens in enumerate(DOCUMENTS):
            shard.add(np.array(tokens, dtype=np.uint32), 10 + number)
    return path


def overwrite(path: Path, position: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(content)


def test_what_was_written_is_read(path: Path) -> None:
    shard = Shard(path)
    assert shard.document_tokens.tolist() == [4, 2, 3]
    for number, tokens in enumerate(DOCUMENTS):
        read = shard.tokens(number, 0, len(tokens) + 1).tolist()
        assert read == [*tokens, END_OF_TEXT]
    assert shard.tokens(0, 1, 3).tolist() == [2, 3]
    assert shard.document_bytes.tolist() == [10, 11, 12]
    assert shard.num_tokens == NUM_TOKENS


def test_equal_documents_give_equal_bytes(path: Path, tmp_path: Path) -> None:
    with write_shard(tmp_path / "again.tokens") as shard:
        for number, tokens in enumerate(DOCUMENTS):
            shard.add(np.array(tokens, dtype=np.uint32), 10 + number)
    assert (tmp_path / "again.tokens").read_bytes() == path.read_bytes()


def test_a_write_that_fails_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), write_shard(tmp_path / "x.tokens") as shard:  # noqa: PT012
        shard.add(np.array([1], dtype=np.uint32), 1)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


Damage = Callable[[Path], None]


def bytes_at(position: int, content: bytes) -> Damage:
    return lambda path: overwrite(path, position, content)


def uint32_at(position: int, value: int) -> Damage:
    return bytes_at(position, struct.pack("<I", value))


def offset_is(number: int, value: int) -> Damage:
    return bytes_at(OFFSETS_AT + 8 * number, struct.pack("<Q", value))


def cut_to(num_bytes: int) -> Damage:
    return lambda path: path.write_bytes(path.read_bytes()[:num_bytes])


def header_with(**changes: object) -> Damage:
    def damage(path: Path) -> None:
        header = json.loads(path.read_bytes()[16:HEADER_BYTES])
        content = json.dumps(header | changes).encode()
        length = struct.pack("<I", len(content))
        overwrite(path, 12, length + content.ljust(HEADER_BYTES - 16))

    return damage


def one_byte_more(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_to(-1), "bytes, its header says"),
        (one_byte_more, "bytes, its header says"),
        (cut_to(100), "too short for its header"),
        (cut_to(0), "must start with b'CPTSHARD'"),
        (bytes_at(0, b"XPTSHARD"), "must start with b'CPTSHARD'"),
        (uint32_at(8, 3), "has format version 3, this code reads 1 and 2"),
        (uint32_at(8, 2), "has format version 2 and loss_bits None"),
        (header_with(loss_bits=True), "has format version 1 and loss_bits True"),
        (bytes_at(20, b"\xff"), "header that is not JSON"),
        (header_with(dtype="uint16"), "without dtype uint32"),
        (header_with(num_tokens=8), "bytes, its header says"),
        (header_with(num_documents=0), "has num_documents 0 in its header, must be above 0"),
        (header_with(num_tokens=-1), "has num_tokens -1"),
        (uint32_at(HEADER_BYTES, VOCAB_SIZE), "token 0 has id 201088, must be below"),
        (uint32_at(HEADER_BYTES, END_OF_TEXT), "holds 4 control tokens for 3"),
        (uint32_at(HEADER_BYTES + 12, 7), "document 0 does not end with END_OF_TEXT"),
        (offset_is(0, 1), "offsets that do not rise"),
        (offset_is(1, 8), "offsets that do not rise"),
        (offset_is(3, 99), "offsets that do not rise"),
        (offset_is(1, 2**64 - 1), "offsets that do not rise"),
        (bytes_at(16, b"[" * (HEADER_BYTES - 16)), "header that is not JSON"),
        (Path.unlink, "cannot be read"),
    ],
)
@pytest.mark.case("B10", "each kind of damage is a DataError that names the file")
def test_damage_is_a_data_error_that_names_the_file(
    path: Path, damage: Damage, message: str
) -> None:
    damage(path)
    with pytest.raises(DataError, match=message) as caught:
        Shard(path)
    assert str(caught.value).startswith(str(path))
    assert caught.value.exit_code == 65


def test_offsets_that_rise_once_around_the_range_of_integers_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "documents.tokens"
    with write_shard(path) as shard:
        for _ in range(4):
            shard.add(np.array([1, 2], dtype=np.uint32), 1)
    offsets = [0, 2**62, 2**63, 2**63 + 2**62, 12]
    overwrite(path, HEADER_BYTES + 4 * 12, struct.pack("<5Q", *offsets))
    assert (np.diff(np.array(offsets, np.uint64).astype(np.int64)) > 0).all()
    with pytest.raises(DataError, match="offsets that do not rise"):
        Shard(path)


MASKS = [[True, False, True], [False], [False, False]]


@pytest.fixture
def masked(tmp_path: Path) -> Path:
    path = tmp_path / "masked.tokens"
    with write_shard(path) as shard:
        for number, (tokens, mask) in enumerate(zip(DOCUMENTS, MASKS, strict=True)):
            ids = np.array(tokens, np.uint32)
            shard.add(ids, 10 + number, False, np.array(mask), 5 + number)
    return path


def test_masks_are_read_beside_the_ids_and_never_in_them(masked: Path, path: Path) -> None:
    shard = Shard(masked)
    shards = Shards(masked.parent, [masked.name])
    plain = Shard(path)
    assert shard.has_loss
    assert shards.has_loss
    assert np.array_equal(shard.all_tokens, plain.all_tokens)
    for number, mask in enumerate(MASKS):
        length = len(mask) + 1
        expected = [False, *mask[1:], True]  # the first token is nobody's label
        assert np.array_equal(shard.tokens(number, 0, length), plain.tokens(number, 0, length))
        assert np.array_equal(shards.tokens(number, 0, length), plain.tokens(number, 0, length))
        loss = shard.loss(number, 0, length)
        assert loss is not None
        assert loss.tolist() == expected
        again = shards.loss(number, 1, length)
        assert again is not None
        assert again.tolist() == expected[1:]
    assert shards.document_bytes.tolist() == [10, 11, 12]
    assert shards.learned_bytes.tolist() == [5, 6, 7]


def test_shard_without_masks_says_that_all_tokens_bear_loss(path: Path) -> None:
    shards = Shards(path.parent, [path.name])
    assert not shards.has_loss
    assert shards.loss(0, 0, 3) is None
    assert shards.learned_bytes.tolist() == shards.document_bytes.tolist()
    pairs = np.array([2, 1])
    counted = shards.count_learned(np.array([0, 2]), np.array([1, 0]), pairs)
    assert counted.tolist() == pairs.tolist()


def test_learned_labels_of_pieces_are_counted_over_several_shards(
    masked: Path, tmp_path: Path
) -> None:
    with write_shard(tmp_path / "more.tokens") as shard:
        shard.add(np.arange(6, dtype=np.uint32), 9, False, np.arange(6) % 2 == 0, 4)
    shards = Shards(tmp_path, [masked.name, "more.tokens"])
    document = np.array([3, 0, 2, 0, 3])
    start = np.array([0, 0, 0, 1, 3])
    pairs = np.array([6, 3, 2, 1, 2])
    expected = []
    for piece in range(len(document)):
        first = int(start[piece]) + 1
        loss = shards.loss(int(document[piece]), first, first + int(pairs[piece]))
        expected.append(np.count_nonzero(loss))
    assert shards.count_learned(document, start, pairs).tolist() == expected == [3, 2, 1, 1, 1]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (uint32_at(HEADER_BYTES, 1 | 1 << 31), "document whose first token bears loss"),
        (uint32_at(HEADER_BYTES + 20, END_OF_TEXT), "document 1 has no token that bears loss"),
        (uint32_at(HEADER_BYTES + 4, VOCAB_SIZE | 1 << 31), "token 1 has id 201088"),
        (bytes_at(OFFSETS_AT + 8 * 8 - 1, b"\xff"), "document of negative size"),
        (one_byte_more, "bytes, its header says"),
    ],
)
def test_damaged_masks_are_an_error_that_names_the_file(
    masked: Path, damage: Damage, message: str
) -> None:
    damage(masked)
    with pytest.raises(DataError, match=r"masked\.tokens") as caught:
        Shard(masked)
    assert message in str(caught.value)


def test_documents_of_which_only_some_have_masks_are_refused(masked: Path, path: Path) -> None:
    shards = Shards(path.parent, [path.name, masked.name])
    with pytest.raises(DataError, match="only some have masks"):
        _ = shards.has_loss


def test_a_shard_with_fewer_documents_than_the_build_says_is_refused(path: Path) -> None:
    stored = Shard(path).num_documents
    counts = np.array([stored + 1])
    shards = Shards(path.parent, [path.name], verify=False, num_documents=counts)
    with pytest.raises(DataError, match=f"holds {stored} documents, and the build more"):
        shards.lengths(0, stored + 1)

"""A token shard is whole or a DataError that names the file (B10)."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from data_pipeline.errors import DataError
from data_pipeline.store.shards import HEADER_BYTES, Shard, writing
from data_pipeline.text.tokenizer import END_OF_TEXT, VOCAB_SIZE

DOCUMENTS = [[1, 2, 3], [4], [5, 6]]
NUM_TOKENS = 9
OFFSETS_AT = HEADER_BYTES + 4 * NUM_TOKENS + 4


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "documents.tokens"
    with writing(path) as shard:
        for number, tokens in enumerate(DOCUMENTS):
            shard.add(np.array(tokens, dtype=np.uint32), 10 + number)
    return path


def overwrite(path: Path, position: int, content: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(position)
        file.write(content)


def test_what_was_written_is_read(path: Path) -> None:
    shard = Shard(path)
    assert [shard.tokens(i, 0, n).tolist() for i, n in enumerate(shard.document_tokens)] == [
        [*tokens, END_OF_TEXT] for tokens in DOCUMENTS
    ]
    assert shard.tokens(0, 1, 3).tolist() == [2, 3]
    assert shard.document_bytes.tolist() == [10, 11, 12] and shard.num_tokens == NUM_TOKENS


def test_equal_documents_give_equal_bytes(path: Path, tmp_path: Path) -> None:
    with writing(tmp_path / "again.tokens") as shard:
        for number, tokens in enumerate(DOCUMENTS):
            shard.add(np.array(tokens, dtype=np.uint32), 10 + number)
    assert (tmp_path / "again.tokens").read_bytes() == path.read_bytes()


def test_a_write_that_fails_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), writing(tmp_path / "x.tokens") as shard:  # noqa: PT012
        shard.add(np.array([1], dtype=np.uint32), 1)
        raise RuntimeError
    assert list(tmp_path.iterdir()) == []


def _header(**changes: object) -> Callable[[Path], None]:
    def change(path: Path) -> None:
        header = json.loads(path.read_bytes()[16:HEADER_BYTES])
        content = json.dumps(header | changes).encode()
        overwrite(path, 12, struct.pack("<I", len(content)) + content.ljust(HEADER_BYTES - 16))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "bytes, its header says"),
        (lambda p: p.write_bytes(p.read_bytes() + b"\0"), "bytes, its header says"),
        (lambda p: p.write_bytes(p.read_bytes()[:100]), "too short for its header"),
        (lambda p: p.write_bytes(b""), "must start with b'CPTSHARD'"),
        (lambda p: overwrite(p, 0, b"XPTSHARD"), "must start with b'CPTSHARD'"),
        (
            lambda p: overwrite(p, 8, struct.pack("<I", 2)),
            "has format version 2, this code reads 1",
        ),
        (lambda p: overwrite(p, 20, b"\xff"), "header that is not JSON"),
        (_header(dtype="uint16"), "without dtype uint32"),
        (_header(num_tokens=8), "bytes, its header says"),
        (_header(num_documents=0), "has num_documents 0 in its header, must be above 0"),
        (_header(num_tokens=-1), "has num_tokens -1"),
        (
            lambda p: overwrite(p, HEADER_BYTES, struct.pack("<I", VOCAB_SIZE)),
            "token 0 has id 201088, must be below",
        ),
        (
            lambda p: overwrite(p, HEADER_BYTES, struct.pack("<I", END_OF_TEXT)),
            "holds 4 control tokens for 3",
        ),
        (
            lambda p: overwrite(p, HEADER_BYTES + 12, struct.pack("<I", 7)),
            "document 0 does not end with END_OF_TEXT",
        ),
        (lambda p: overwrite(p, OFFSETS_AT, struct.pack("<Q", 1)), "offsets that do not rise"),
        (lambda p: overwrite(p, OFFSETS_AT + 8, struct.pack("<Q", 8)), "offsets that do not rise"),
        (
            lambda p: overwrite(p, OFFSETS_AT + 24, struct.pack("<Q", 99)),
            "offsets that do not rise",
        ),
        (
            lambda p: overwrite(p, OFFSETS_AT + 8, struct.pack("<Q", 2**64 - 1)),
            "offsets that do not rise",
        ),
        (lambda p: p.unlink(), "cannot be read"),
    ],
)
@pytest.mark.case("B10", "each kind of damage is a DataError that names the file")
def test_damage_is_a_data_error_that_names_the_file(
    path: Path, damage: Callable[[Path], None], message: str
) -> None:
    damage(path)
    with pytest.raises(DataError, match=message) as caught:
        Shard(path)
    assert str(caught.value).startswith(str(path)) and caught.value.exit_code == 65

"""JSON of others is read within limits, and every refusal is one exception with the line."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from data_pipeline.bounded.files import MalformedInput
from data_pipeline.bounded.json_text import depth_of, parse_json, read_json

BOMBS = {
    "deep list": b"[" * 100_000,
    "deep object": b'{"a":' * 100_000,
    "closed deep list": b"[" * 65 + b"]" * 65,
    "digits": b"[1" + b"0" * 5000 + b"]",
    "more digits than 128 bits": b"1" + b"0" * 40,
    "no UTF-8": b'"\xff"',
    "surrogate in bytes": b'"\xed\xa0\x80"',
    "surrogate in escapes": b'{"a": "\\ud800"}',
    "cut off": b'{"a": 1',
    "empty": b"",
    "another format": b"a: 1",
    "UTF-16": '{"a": 1}'.encode("utf-16"),
}


@pytest.mark.parametrize("content", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_by_one_exception_and_at_once(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    started = time.process_time()
    with pytest.raises(MalformedInput):
        read_json(path)
    assert time.process_time() - started < 0.2


def test_a_file_is_read_up_to_its_limit_only(tmp_path: Path) -> None:
    path = tmp_path / "huge.json"
    with path.open("wb") as file:
        file.truncate(10 * 2**30)
    with pytest.raises(MalformedInput, match="larger than 1,000 bytes"):
        read_json(path, 1000)


@pytest.mark.parametrize("path", ["/dev/zero", "/", "no\0name", "\ud800", "n" * 5000])
def test_what_is_no_regular_file_is_an_error_of_the_system(path: str) -> None:
    with pytest.raises(OSError, match=r"."):
        read_json(Path(path))


def test_a_pipe_that_nobody_writes_to_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="Not a regular file"):
        read_json(tmp_path / "pipe")


def test_a_message_has_the_file_and_the_line() -> None:
    with pytest.raises(MalformedInput) as caught:
        parse_json('{\n"a": 1,\n}')
    assert caught.value.of("f.json").startswith("f.json:3: not valid JSON: ")


def test_a_reader_that_only_shows_texts_may_take_half_a_surrogate_pair() -> None:
    assert parse_json('"\\ud800"', lone_surrogates=True) == "\ud800"


def test_a_key_that_is_given_twice_is_refused_on_request() -> None:
    assert parse_json('{"a": 1, "a": 2}') == {"a": 2}
    with pytest.raises(MalformedInput, match="'a' is given twice"):
        parse_json('{"b": {"a": 1, "a": 2}}', unique=True)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("\ufeff1", None),
        ('{"a": [1, -2.5e3, null, true]}', {"a": [1, -2500.0, None, True]}),
        ('"\\ud83d\\ude00"', "\U0001f600"),
        ("1" + "0" * 39, 10**39),
        ("[" * 64 + "]" * 64, ...),
    ],
)
def test_what_is_within_the_limits_is_read(text: str, value: object) -> None:
    if value is None:
        assert parse_json(text.encode()) == 1, "with the mark of some editors"
    elif value is ...:
        assert depth_of(parse_json(text)) == 64
    else:
        assert parse_json(text) == value

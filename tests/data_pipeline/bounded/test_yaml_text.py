"""YAML of others is read within limits, and every refusal is one exception with the line."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_pipeline.bounded.files import MalformedInput
from data_pipeline.bounded.yaml_text import plain_yaml, read_yaml
from tests.support.bombs import alias_bomb

BOMBS = {
    "aliases": alias_bomb(),
    "an alias within itself": "a: &a [*a, *a]",
    "deep flow": "{a: " * 5000,
    "deep block": "- " * 5000,
    "digits": "a: " + "9" * 5000,
    "escape": 'a: "\\UFFFFFFFF"',
    "surrogate": 'a: "\\uD800"',
    "Python object": "a: !!python/object/apply:os.system [id]",
    "merge": "a: &a {b: 1}\nc: {!!merge <<: *a}",
    "list as a key": "? [a]\n: b",
    "control character": "a: \x07",
}


@pytest.fixture(autouse=True)
def no_collection() -> Iterator[None]:
    """Collect no garbage meanwhile: with the leavings of many tests it takes long."""
    gc.disable()
    yield
    gc.enable()


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_a_bomb_is_refused_by_one_exception_and_at_once(text: str) -> None:
    started = time.process_time()
    with pytest.raises(MalformedInput):
        plain_yaml(text)
    assert time.process_time() - started < 0.2


def test_a_list_of_too_many_values_is_refused_before_it_is_read_to_its_end(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("data_pipeline.bounded.yaml_text.MAX_VALUES", 100)
    with pytest.raises(MalformedInput, match="line 200: more than"):
        plain_yaml("- 1\n" * 202 + "- [")


def test_a_file_of_a_million_entries_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "many.yaml"
    path.write_text("- 1\n" * 1_000_000)
    started = time.process_time()
    with pytest.raises(MalformedInput, match="larger than 1,048,576 bytes"):
        read_yaml(path)
    assert time.process_time() - started < 0.2


def test_aliases_and_the_scalars_of_yaml_1_2_are_read() -> None:
    text = "a: &a [no, 1e-5, 1:30:00, 2026-01-01, ~]\nb: *a\n<<: 1"
    values = ["no", 1e-5, "1:30:00", "2026-01-01", None]
    assert plain_yaml(text) == {"a": values, "b": values, "<<": 1}
    assert plain_yaml("") is None

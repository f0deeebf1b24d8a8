"""Configuration files mean what they say, or are refused with file, line and key."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pytest

from data_pipeline.config.strict_yaml import Reader, load_json, load_yaml, parse_yaml, read_file
from data_pipeline.errors import ConfigError
from tests.support.bombs import alias_bomb


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner:
    lr: float = 1.0
    kind: Literal["cosine", "linear"] = "cosine"
    limit: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer:
    steps: int
    lang: str = "ja"
    inner: Inner = Inner()
    parts: tuple[Inner, ...] = ()
    path: str | tuple[str, ...] = ""


def problems_of(text: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        read_file(Outer, parse_yaml(text, "f.yaml"))
    return caught.value.problems


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-5", 1e-5),
        ("-1E+3", -1000.0),
        (".5", 0.5),
        ("5.", 5.0),
        ("1_000", 1000),
        ("no", "no"),
        ("on", "on"),
        ("true", True),
        ("1:30:00", "1:30:00"),
        ("2024-01-01", "2024-01-01"),
        ("~", None),
        ("", None),
        ("0x10", "0x10"),
        ("'1'", "1"),
    ],
)
@pytest.mark.case("G1", "no, 1e-5 and 1:30:00 keep their meaning")
def test_scalars_follow_yaml_1_2(text: str, value: Any) -> None:
    read = parse_yaml(f"a: {text}\n", "f").value["a"]
    assert read == value and type(read) is type(value)


def test_a_good_file_becomes_dataclasses() -> None:
    text = (
        "steps: 3\nlang: no\ninner: {lr: 1e-5, kind: linear}\n"
        "parts: [{limit: 2}, {}]\npath: [a, b]\n"
    )
    built = read_file(Outer, parse_yaml(text, "f.yaml"))
    parts = (Inner(limit=2), Inner())
    assert built == Outer(
        steps=3, lang="no", inner=Inner(lr=1e-5, kind="linear"), parts=parts, path=("a", "b")
    )


def test_all_problems_are_reported_with_line_and_key() -> None:
    text = "stepz: 3\ninner:\n  lr: fast\n  kind: step\nparts:\n  - limit: 1.5\n"
    assert problems_of(text) == [
        "f.yaml:1: stepz is not a known key. Did you mean 'steps'?",
        "f.yaml:1: steps is missing. It has no default: add it.",
        "f.yaml:3: inner.lr is 'fast', must be a number.",
        "f.yaml:4: inner.kind is 'step', must be one of: cosine, linear.",
        "f.yaml:6: parts[0].limit is 1.5, must be a whole number.",
    ]


def test_duplicate_key_is_refused_with_both_lines() -> None:
    assert problems_of("steps: 1\nlang: ja\nsteps: 2\n") == [
        "f.yaml:3: steps is given twice (first in line 1). Remove one."
    ]


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_a_number_that_is_not_finite_is_refused(value: str) -> None:
    assert "must be a finite number" in problems_of(f"steps: 1\ninner: {{lr: {value}}}\n")[0]


@pytest.mark.parametrize("value", ["true", "1.0", "'1'", "[1]", ""])
def test_a_whole_number_is_nothing_else(value: str) -> None:
    assert "must be a whole number" in problems_of(f"steps: {value}\n")[0]


def test_an_empty_section_means_its_defaults() -> None:
    assert read_file(Outer, parse_yaml("steps: 1\ninner:\n", "f.yaml")).inner == Inner()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1", "not valid YAML"),
        ("a: !!python/object:os.system {}", "not valid YAML"),
        ("a: \0", "not valid YAML"),
        ("a: " + "[" * 2000, "nested too deeply"),
        ("a: &x [*x]", "nested too deeply"),
        ("a: " + "9" * 41, "at most 40 are read"),
        ("? [a]\n: b", "not valid YAML"),
        ("a: 1\n---\nb: 2", "not valid YAML"),
        ("a: !!bool maybe", "'maybe' is no bool"),
        ("a: !!int '1:1:1'", "is no int"),
        ("a: !!timestamp 2026-01-01", "not valid YAML"),
        ("a: &a {b: 1}\nc: {!!merge <<: *a}", "not valid YAML"),
        ('a: "\\UFFFFFFFF"', "cannot be read"),
        ('a: "\\uD800"', "half a surrogate pair"),
        ('a: "\\0"', "a NUL"),
    ],
)
@pytest.mark.case("X6", "hostile YAML is a configuration error")
def test_hostile_yaml_is_a_configuration_error(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=f"^f.yaml.*{message}"):
        parse_yaml(text, "f.yaml")


@pytest.mark.case("X6", "aliases cannot blow a file up")
def test_aliases_cannot_blow_a_file_up() -> None:
    with pytest.raises(ConfigError, match="aliases add more than 10,000 values"):
        parse_yaml(alias_bomb(), "f.yaml")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    (tmp_path / "latin.yaml").write_bytes(b"a: \xe9\n")
    with pytest.raises(ConfigError, match=r"latin.yaml:1: not UTF-8 at byte 3"):
        load_yaml(tmp_path / "latin.yaml")
    with pytest.raises(ConfigError, match=r"none.yaml: no such file"):
        load_yaml(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match="directory"):
        load_yaml(tmp_path)
    with pytest.raises(ConfigError, match="Not a regular file"):
        load_yaml("/dev/zero")
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match=r"pipe.yaml: Not a regular file"):
        load_yaml(tmp_path / "pipe.yaml")
    with (tmp_path / "huge.yaml").open("wb") as file:
        file.truncate(10 * 2**30)
    with pytest.raises(ConfigError, match=r"huge.yaml: larger than 1,048,576 bytes"):
        load_yaml(tmp_path / "huge.yaml")
    with pytest.raises(ConfigError, match="Not a file name"):
        load_yaml("a\0b")


@pytest.mark.parametrize("value", [10**30, -(2**63) - 1])
def test_a_whole_number_fits_into_64_bits(value: int) -> None:
    assert "must be less than 2^63" in problems_of(f"steps: {value}\n")[0]


def test_a_text_of_any_length_or_kind_is_shown_short_and_in_one_line() -> None:
    (problem,) = problems_of('steps: "a\\e[2J\\nFAKE' + "b" * 9000 + '"\n')
    assert len(problem) < 400
    assert r"a\x1b[2J\nFAKE" in problem


def test_json_has_lines_and_strict_syntax(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{\n\t"steps": 1,\n\t"inner": {"lr": 1e-5, "limt": 3}\n}')
    located = load_json(path)
    assert located.value["inner"]["lr"] == 1e-5
    with pytest.raises(
        ConfigError, match=r"ds.json:3: inner.limt is not a known key. Did you mean 'limit'?"
    ):
        read_file(Outer, located)
    path.write_text('{"a": 1,\n "b": 2,}')
    with pytest.raises(ConfigError, match=r"ds.json:2: not valid JSON"):
        load_json(path)


def test_overrides_replace_and_create_values() -> None:
    located = parse_yaml("steps: 1\ninner:\n", "f.yaml").with_values(
        {"inner.lr": "2e-5", "steps": "4"}
    )
    built = read_file(Outer, located)
    assert (built.steps, built.inner.lr) == (4, 2e-5)
    with pytest.raises(ConfigError, match="'steps' is not a section"):
        located.with_values({"steps.more": "1"})


def test_cross_field_rules_name_their_key() -> None:
    @dataclass(frozen=True, kw_only=True, slots=True)
    class Checked:
        parts: tuple[Inner, ...]

        def check(self) -> Any:
            yield "parts[1].lr", "is too large."

    reader = Reader(parse_yaml("parts:\n  - {}\n  - lr: 3\n", "f.yaml"))
    assert reader.read(Checked) is None
    assert reader.problems == ["f.yaml:3: parts[1].lr is too large."]


def test_json_with_characters_written_as_pairs_is_read(tmp_path: Path) -> None:
    """As json.dumps writes them unless it is told otherwise."""
    path = tmp_path / "ds.json"
    values = {"path": "/data/\U00020bb7\u91ce", "\U0001f600": "\U0001f600\U0001f601"}
    path.write_text(json.dumps(values))
    assert "\\ud83d\\ude00" in path.read_text()
    assert load_json(path).value == values


@pytest.mark.parametrize("half", ["\\ud83d", "\\ude00", "\\ude00\\ud83d", "\\ud83d\\ud83d\\ude00"])
def test_half_a_pair_is_refused(half: str, tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(f'{{"path": "{half}"}}')
    with pytest.raises(ConfigError, match="half a surrogate pair"):
        load_json(tmp_path / "ds.json")

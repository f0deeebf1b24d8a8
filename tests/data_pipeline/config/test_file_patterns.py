"""A pattern names what `glob` finds, but no folder twice, no pipe and no device."""

from __future__ import annotations

import glob
import os
import time
from pathlib import Path

import pytest

from data_pipeline.config import file_patterns
from data_pipeline.config.file_patterns import expand
from data_pipeline.config.mix_file import load_mix
from data_pipeline.errors import ConfigError

FILES = ("a.txt", "d/b.txt", "d/e/c.txt", "d/.h/x.txt", ".hidden.txt", "d/e/z.md", "[1]/f.txt")
PATTERNS = (
    "**/*.txt",
    "**",
    "**/",
    "**/*",
    "*/**/*.txt",
    "d/**/e/*.txt",
    "**/e/**/*.txt",
    "**/**/*.txt",
    "d/*.txt",
    "nothing/**/*.txt",
    "**/.hidden.txt",
    "**/c.txt",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in FILES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("text")
    return tmp_path


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_pattern_names_what_glob_finds(pattern: str, folder: Path) -> None:
    whole = f"{glob.escape(str(folder))}/{pattern}"
    expected = {path for path in glob.glob(whole, recursive=True) if os.path.isfile(path)}
    assert expand(whole) == sorted(map(Path, expected))


def test_links_are_followed_and_loops_of_links_end(folder: Path) -> None:
    elsewhere = folder / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "g.jsonl").write_text("{}")
    corpus = folder / "corpus"
    corpus.mkdir()
    (corpus / "linked").symlink_to(elsewhere)
    for name in ("first", "second", "third"):
        (corpus / name).symlink_to(corpus)
    start = time.process_time()
    assert expand(f"{corpus}/**/*.jsonl") == [corpus / "linked" / "g.jsonl"]
    assert expand(f"{corpus}/**/*.nothing") == []
    assert time.process_time() - start < 2


def test_too_many_files_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_patterns, "MAX_FILES", 2)
    with pytest.raises(OSError, match="more than 2 files"):
        expand(f"{folder}/**/*.txt")


@pytest.mark.parametrize("name", ["pipe", "/dev/zero"])
def test_a_pipe_or_a_device_is_refused_at_once(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    mix = tmp_path / "mix.yaml"
    source = f"name: a, language: en, domain: web, path: {name}, format: jsonl, weight: 1.0"
    mix.write_text(f"seq_len: 16\nseed: 1\nsources: [{{{source}}}]\n")
    with pytest.raises(ConfigError, match="is a pipe, a socket or a device"):
        load_mix(mix)


@pytest.mark.parametrize("character", ["\n", "\x1b", "\x9b", "\u2028"])
def test_a_name_that_could_forge_a_line_is_refused_and_shown_as_it_is(
    character: str, tmp_path: Path
) -> None:
    (tmp_path / f"a{character}FAKE: verified ok.jsonl").write_text("{}")
    with pytest.raises(OSError, match=r"'[^\x1b\n]*a\\[^\x1b\n]*' has a control character"):
        expand(str(tmp_path / "*.jsonl"))


def test_what_is_no_file_may_have_any_name(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "folder\n").mkdir()
    os.mkfifo(tmp_path / "pipe\n")
    icon = tmp_path / "Icon\r"  # macOS puts it into folders with icons of their own
    icon.write_bytes(b"")
    assert expand(str(tmp_path / "*")) == [tmp_path / "a.jsonl"]
    assert expand(str(tmp_path / "**")) == [tmp_path / "a.jsonl"]
    icon.write_text("text")
    with pytest.raises(OSError, match=r"Icon\\r' has a control character"):
        expand(str(tmp_path / "*"))
    icon.unlink()
    (tmp_path / "folder\n" / "b.jsonl").write_text("{}")
    with pytest.raises(OSError, match="has a control character"):
        expand(str(tmp_path / "*" / "*"))

"""Every command in README.md and docs/ has options that exist, and none is missing."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest

from cpt import cli
from cpt.run import parse_arguments
from data_pipeline.__main__ import main as data_main
from data_pipeline.commands import CommandParser

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS: dict[str, Callable[[list[str]], object]] = {
    r"(?:\.venv/bin/)?cpt": cli.main,
    r"(?:\.venv/bin/)?python -m data_pipeline": data_main,
    r"(?:\.venv/bin/)?(?:deepspeed|torchrun|python)(?: --num_gpus \d+| --nproc_per_node \d+)?"
    r" cpt/run\.py": parse_arguments,
    r"(?:\.venv/bin/)?deepspeed(?: --num_gpus \d+)? cpt/cli\.py": cli.main,
}
"""What reads the words behind each way to start a program."""


class Parsed(Exception):
    """Ends a program once its command line was read."""


def commands() -> list[tuple[str, str]]:
    """Return (page, command) for each command in an indented or fenced block, placeholders left
    out.
    """
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for line in text.splitlines():
            words = re.sub(r"\s+", " ", line.split(" #")[0]).strip()
            is_command = line.startswith("    ") or re.match(r"^(\.venv|cpt |deepspeed )", line)
            if is_command and not re.search(r"\.\.\.|\[|\||N\b|&&", words):
                found.append((page.name, words))
    return found


def reader_of(command: str) -> tuple[Callable[[list[str]], object], list[str]] | None:
    """Return what reads a command line, and its words; None for another program."""
    command = re.sub(r"^(?:[A-Z_]+=\S+ )+", "", command)
    for pattern, reader in PROGRAMS.items():
        match = re.match(rf"{pattern}(?= |$)", command)
        if match:
            return reader, shlex.split(command[match.end() :])
    return None


OURS = [(page, command) for page, command in commands() if reader_of(command) is not None]


def test_commands_are_found_in_the_pages() -> None:
    pages = {page for page, _ in OURS}
    assert {"README.md", "data.md", "planning.md"} <= pages and len(OURS) > 30


@pytest.mark.parametrize(("page", "command"), OURS, ids=[command for _, command in OURS])
def test_command_of_a_page_can_be_read(
    page: str, command: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = CommandParser.parse_args

    def parse_and_end(parser: CommandParser, arguments: list[str]) -> NoReturn:
        raise Parsed(read(parser, arguments))

    monkeypatch.setattr(CommandParser, "parse_args", parse_and_end)
    found = reader_of(command)
    assert found is not None
    reader, words = found
    with pytest.raises(Parsed) as ended:
        reader(words)
    assert isinstance(ended.value.args[0], argparse.Namespace)

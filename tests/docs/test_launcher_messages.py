"""docs/troubleshooting.md quotes what DeepSpeed's launcher says before this project's code runs."""

from __future__ import annotations

import inspect
import re
from pathlib import Path

import pytest
from deepspeed.launcher import runner

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "troubleshooting.md").read_text("utf-8")


@pytest.mark.parametrize(
    "lines",
    [["node0 slot=8"], ["node0 slots=8", "node0 slots=8"], ["# nothing"]],
    ids=["bad-line", "host-twice", "empty"],
)
def test_refusal_of_a_host_file_is_on_the_page(lines: list[str]) -> None:
    with pytest.raises(ValueError) as caught:
        runner._parse_hostfile(lines)
    first_words = re.split(r" for |: |,", str(caught.value))[0]
    assert f"`{first_words}" in PAGE


@pytest.mark.parametrize(
    "words", ["Unable to find hostfile, will proceed", "was not reachable via ssh"]
)
def test_other_messages_on_the_page_are_those_of_the_launcher(words: str) -> None:
    source = re.sub(r'"\s*\n\s*f?"', "", inspect.getsource(runner))
    assert words in source and words in PAGE


def test_host_without_slots_starts_nothing_without_a_word() -> None:
    assert runner._parse_hostfile(["node0 slots=0"]) == {"node0": 0}
    assert "slots=0" in PAGE

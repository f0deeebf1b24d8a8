"""docs/security.md names tests that exist, and a test for each promise."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[\w/.]+::\w+)`", PAGE)))


def test_every_promise_names_a_test() -> None:
    promises = PAGE.partition("## Promised")[2].partition("## Not promised")[0]
    rows = [line for line in promises.splitlines() if line.startswith("| ")]
    without = [row for row in rows if "::" not in row and row != "| promise | test |"]
    assert len(rows) > 10 and without == []


@pytest.mark.parametrize("test", NAMED)
def test_named_test_exists(test: str) -> None:
    file, _, name = test.partition("::")
    names = set()
    for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
    assert name in names

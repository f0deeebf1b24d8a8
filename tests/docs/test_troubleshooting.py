"""docs/troubleshooting.md quotes messages that the code writes, and knows every exit code."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import pytest

from cpt import errors

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
QUOTED = re.findall(r'\*\*"([^"]+)"\*\*', PAGE)


def text_of(node: ast.expr) -> str:
    """Return the text of a string in the code, with a digit for each value put into it."""
    if isinstance(node, ast.JoinedStr):
        return "".join(text_of(part) for part in node.values)
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    return "0"


@functools.cache
def messages() -> str:
    """Return all strings of the code, one a line, and the job templates."""
    lines = []
    for package in ("cpt", "data_pipeline"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.JoinedStr | ast.Constant):
                    lines.append(text_of(node))
    for path in sorted((ROOT / "slurm").rglob("*")):
        if path.is_file():
            lines.append(path.read_text(encoding="utf-8"))
    return "\n".join(lines)


@pytest.mark.parametrize("quoted", QUOTED)
def test_quoted_message_stands_in_the_code(quoted: str) -> None:
    assert quoted in messages()


def test_every_exit_code_is_explained() -> None:
    raised = [value for value in vars(errors).values() if isinstance(value, type)]
    codes = {cls.exit_code for cls in raised if issubclass(cls, errors.CptError)}
    codes.add(errors.EXIT_DONE)
    assert codes == {0, 65, 70, 71, 74, 75, 78}
    assert [code for code in sorted(codes) if f"| {code} |" not in PAGE] == []

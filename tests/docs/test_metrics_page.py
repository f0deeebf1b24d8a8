"""docs/metrics.md names every event that the code writes, and every field that it names itself."""

from __future__ import annotations

import ast
import functools
import re
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")


def constants(node: ast.expr) -> list[str]:
    """Return the texts that an expression can be: one, or the two of a conditional expression."""
    if isinstance(node, ast.IfExp):
        return [*constants(node.body), *constants(node.orelse)]
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return [node.value]
    return []


@functools.cache
def written_events() -> dict[str, set[str]]:
    """Return the fields of each event that stand beside its name in a dictionary of the code."""
    events: dict[str, set[str]] = defaultdict(set)
    for path in (ROOT / "cpt").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.Dict):
                continue
            keys = [key.value for key in node.keys if isinstance(key, ast.Constant)]
            if "event" not in keys:
                continue
            fields = {str(key) for key in keys} - {"event", "step"}
            names = [
                name
                for key, value in zip(node.keys, node.values, strict=True)
                if isinstance(key, ast.Constant) and key.value == "event"
                for name in constants(value)
            ]
            for name in names:
                events[name] |= fields
    return events


def section(event: str) -> str:
    """Return the part of the page that describes an event."""
    found = re.search(rf"### `{event}`\n(.*?)(?=\n##|\Z)", PAGE, re.DOTALL)
    assert found, f"docs/metrics.md does not describe the event {event}"
    return found[1]


def test_the_code_writes_events() -> None:
    assert {"start", "step", "guard", "guard_decision", "checkpoint", "goodput"} <= set(
        written_events()
    )


def test_every_event_is_described_with_its_fields() -> None:
    missing = []
    for event, fields in sorted(written_events().items()):
        described = section(event)
        for field in sorted(fields):
            if f"`{field}`" not in described:
                missing.append(f"{event}: {field}")
    assert missing == []


def test_page_describes_no_event_that_is_not_written() -> None:
    described = set(re.findall(r"^### `(\w+)`$", PAGE, re.MULTILINE))
    assert described == set(written_events())

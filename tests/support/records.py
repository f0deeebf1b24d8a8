"""JSONL files for tests."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def write_jsonl(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Write one record a line."""
    with path.open("w", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps(record) + "\n")


def read_jsonl(path: Path) -> list[Any]:
    """Return all records."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

"""Count what one micro step moves, computes and launches on a GPU, without one.

    python bench/gpu_counts.py

It rewrites cpt/planning/gpu_counts.json, the tables of docs/gpu.md, and docs/gpu_counts.svg.

The real step runs on fake tensors that say they are on a GPU (tests/support/gpu_rehearsal), with
few layers, and is scaled to the whole model. The table has bytes, FLOPs, launches and the least
time of every part; tests/gpu_rehearsal fails where the code costs more, or less, than it says.
Nothing is measured: a kernel that is slower than its bytes and FLOPs allow looks fast here.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "bench")]
from gpu_counts_parts.drawing import draw  # noqa: E402
from gpu_counts_parts.tables import markdown, table_of  # noqa: E402

from tests.support.gpu_rehearsal.fake_cuda import reason_against  # noqa: E402
from tests.support.gpu_rehearsal.launch import rehearse  # noqa: E402
from tests.support.gpu_rehearsal.shapes import SHAPES, two_layers  # noqa: E402

TABLE = ROOT / "cpt" / "planning" / "gpu_counts.json"
BEFORE = ROOT / "bench" / "gpu_counts_before.json"
"""The table of commit b2a4cc9, before anything was fused."""
PAGE = ROOT / "docs" / "gpu.md"
DRAWING = ROOT / "docs" / "gpu_counts.svg"

BEGIN = "<!-- counted: begin -->"
END = "<!-- counted: end -->"


def main() -> None:
    """Count, and write the table, the page and the drawing."""
    reason = reason_against()
    if reason:
        sys.exit(f"nothing counted: {reason}")
    scenarios = [*SHAPES, *(two_layers(shape) for shape in SHAPES)]
    with tempfile.TemporaryDirectory() as folder:
        found = rehearse(scenarios, Path(folder))
    for name, result in found.items():
        if result["error"]:
            sys.exit(f"{name}: {result['error']}")
    table = table_of(found)
    TABLE.write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    before: dict[str, Any] = json.loads(BEFORE.read_text(encoding="utf-8"))
    tables = markdown(before, table)
    print(tables)
    PAGE.write_text(with_tables(PAGE.read_text(encoding="utf-8"), tables), encoding="utf-8")
    DRAWING.write_text(draw(before, table), encoding="utf-8")


def with_tables(page: str, tables: str) -> str:
    """Return a page with other tables between its two marks."""
    head, rest = page.split(BEGIN)
    _, tail = rest.split(END)
    return f"{head}{BEGIN}\n\n{tables}\n{END}{tail}"


if __name__ == "__main__":
    main()

"""The part of docs/precision.md that the proof writes: its tables, between two marks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mxfp4_parts import outcome, product

BEGIN = "<!-- proof: begin -->"
END = "<!-- proof: end -->"


def write_page(path: Path, report: dict[str, Any]) -> None:
    """Put the tables of a report between the marks of a page.

    Raises:
        ValueError: the page has no marks.
    """
    text = path.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"{path} has no {BEGIN} and {END} to write the tables between.")
    path.write_text(f"{before}{BEGIN}\n\n{section(report)}\n\n{END}{after}", encoding="utf-8")


def section(report: dict[str, Any]) -> str:
    """Return the tables of a report, in Markdown."""
    cells = report["cells"]
    seconds = sum(cell["cpu_seconds"] for cell in cells)
    parts = [
        f"{report['date']}, {report['machine']}: {report['cells_run']} of "
        f"{report['cells_planned']} cells, {seconds / 60:.0f} CPU minutes without the releases.\n"
        "Means over seeds with 95 % intervals (Student's t); without an interval it is one seed.",
        "Survived of what the experts learned, in % of it, on held-out Japanese:",
        outcome.table(cells),
        "What an export adds to held-out English, in bits per 1,000 bytes:",
        outcome.english_table(cells),
        "What an export keeps of the movement of the experts (projection), and the error of their "
        "values:",
        outcome.kept_table(cells),
        "The releases:",
        outcome.releases_table(report["releases"]),
    ]
    if "product" in report:
        parts.append(product.told(report["product"]))
    return "\n\n".join(parts)

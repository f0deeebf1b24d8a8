"""Measure how much the lines of the code carry: `python -m tests.support.density [FOLDER ...]`.

The bounds are the range of torchtitan, OLMo-core, nanochat and ArcticTraining, measured with this
script in August 2026.
"""

from __future__ import annotations

import ast
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

LONG_LINE = 100
"""Characters; a longer line of code counts as long."""
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
MAX_PER_1000 = {"comprehensions": 24.0, "tuple assignments": 9.0, "conditional expressions": 18.0}
"""Largest number per 1,000 statements."""
MAX_LONG_LINES_PERCENT = 6.0


@dataclass(kw_only=True)
class Density:
    """Counts over a set of files."""

    statements: int = 0
    nodes: dict[str, int] = field(default_factory=dict)
    """Occurrences by kind."""
    code_lines: int = 0
    long_lines: int = 0
    comment_lines: int = 0
    file_lines: list[int] = field(default_factory=list)
    function_lines: list[int] = field(default_factory=list)

    def per_1000(self, kind: str) -> float:
        """Occurrences of a kind per 1,000 statements."""
        return 1000 * self.nodes.get(kind, 0) / max(1, self.statements)

    def long_lines_percent(self) -> float:
        """Share of the lines of code that are longer than `LONG_LINE`."""
        return 100 * self.long_lines / max(1, self.code_lines)

    def add(self, path: Path) -> None:
        """Count one file."""
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text, str(path))
        for node in ast.walk(tree):
            self.statements += isinstance(node, ast.stmt)
            kind = kind_of(node)
            if kind is not None:
                self.nodes[kind] = self.nodes.get(kind, 0) + 1
            if isinstance(node, FUNCTIONS) and node.end_lineno is not None:
                self.function_lines.append(node.end_lineno - node.lineno + 1)
        self._add_lines(text, docstring_lines(tree))

    def _add_lines(self, text: str, docstrings: set[int]) -> None:
        lines = text.splitlines()
        self.file_lines.append(len(lines))
        for number, line in enumerate(lines, 1):
            if not line.strip() or number in docstrings:
                continue
            if line.lstrip().startswith("#"):
                self.comment_lines += 1
                continue
            self.code_lines += 1
            self.long_lines += len(line) > LONG_LINE


def kind_of(node: ast.AST) -> str | None:
    """The kind under which a node is counted; None for most."""
    if isinstance(node, COMPREHENSIONS):
        return "comprehensions"
    if isinstance(node, ast.IfExp):
        return "conditional expressions"
    if isinstance(node, ast.Lambda):
        return "lambdas"
    if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
        to_tuple = any(isinstance(target, ast.Tuple) for target in node.targets)
        return "tuple assignments" if to_tuple else None
    return None


def docstring_lines(tree: ast.Module) -> set[int]:
    """Numbers of the lines that are strings standing alone."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        alone = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
        if alone and isinstance(node.value.value, str) and node.end_lineno is not None:
            lines.update(range(node.lineno, node.end_lineno + 1))
    return lines


def sources(folders: list[str]) -> Iterator[Path]:
    """Python files of folders, or files that are named."""
    for folder in folders:
        path = Path(folder)
        yield from sorted(path.rglob("*.py")) if path.is_dir() else [path]


def measure(folders: list[str]) -> Density:
    """Count all Python files below some folders."""
    density = Density()
    for path in sources(folders):
        density.add(path)
    return density


def quantiles(values: list[int]) -> str:
    """Median, 90th percentile and maximum."""
    ordered = sorted(values) or [0]
    p90 = ordered[int(0.9 * (len(ordered) - 1))]
    return f"{statistics.median(ordered):.0f} / {p90} / {ordered[-1]}"


def report(density: Density) -> str:
    """One figure a line."""
    lines = [
        f"files                     {len(density.file_lines)}, {sum(density.file_lines):,} lines",
        f"statements                {density.statements:,}",
        f"file med/p90/max          {quantiles(density.file_lines)}",
        f"function med/p90/max      {quantiles(density.function_lines)}",
        f"functions > 40 lines      {sum(n > 40 for n in density.function_lines)}",
    ]
    for kind in (*MAX_PER_1000, "lambdas"):
        bound = f"   (at most {MAX_PER_1000[kind]:.0f})" if kind in MAX_PER_1000 else ""
        lines.append(f"{kind:<26}{density.per_1000(kind):.1f} per 1,000 statements{bound}")
    long_lines = f"{density.long_lines_percent():.1f} %"
    lines.append(
        f"code lines > {LONG_LINE}          {long_lines}   (at most {MAX_LONG_LINES_PERCENT:.0f} %)"
    )
    all_lines = density.code_lines + density.comment_lines
    lines.append(
        f"comment-only lines        {100 * density.comment_lines / max(1, all_lines):.1f} %"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    print(report(measure(sys.argv[1:] or ["cpt", "data_pipeline"])))

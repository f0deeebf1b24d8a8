"""Which tests are fast: those that start no process and, together, take under two minutes.

`python -m pytest --fast` runs them, and `make check` does so after ruff and mypy.  A test file that
starts processes is recognized by what it imports; files that only compute for long are listed here.
"""

from __future__ import annotations

import ast
import functools
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]

FOLDERS_LEFT_OUT = ("dist", "faults", "slurm")
"""Folders of tests/ whose tests start a whole run or a whole cluster."""

FILES_LEFT_OUT = (
    "model/attention/test_gpu_backends.py",
    "model/attention/test_probe.py",
    "model/attention/test_sink_attention.py",
    "telemetry/test_report.py",
)
"""Files of tests/ that start no process but compute for more than 20 seconds."""

STARTS_PROCESSES = (
    "subprocess",
    "multiprocessing",
    "tests.support.launcher.launch",
    "tests.support.launcher.start",
    "tests.support.service",
    "tests.support.browser",
    "tests.support.gpu_rehearsal.launch.rehearse",
    "cpt.telemetry.report.periodic",
)
"""Imported modules and functions by which a test file that starts processes is recognized."""


@functools.cache
def is_fast(path: Path) -> bool:
    """Return whether the tests of a file belong to the fast ones."""
    relative = path.relative_to(TESTS)
    if relative.parts[0] in FOLDERS_LEFT_OUT or relative.as_posix() in FILES_LEFT_OUT:
        return False
    return not imported_names(path) & set(STARTS_PROCESSES)


def imported_names(path: Path) -> set[str]:
    """Return the modules that a Python file imports, at any depth, and what it takes from them."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names

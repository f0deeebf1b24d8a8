"""Shared by all tests: which of them run, and the table of fault cases.

`pytest` runs everything but the slow tests of fault cases (those of tests/faults that are not
marked `quick`, those of other folders that are marked `slow`) and says how many it left out.
`pytest --faults` runs every test that shows a case of docs/reliability.md, wherever it lives.
Naming tests/faults runs what is named.
`pytest --fast` runs the fast tests only (tests/support/fast.py).
"""

from __future__ import annotations

import gc
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.fast import FOLDERS_LEFT_OUT, TESTS, is_fast
from tests.support.fault_table import FaultTable, update

torch.set_num_threads(
    1
)  # two threads on a busy two-core machine wait for each other more than they compute

if not torch.cuda.is_available():
    # read when Triton is imported: its kernels then run on CPU tensors, slowly
    os.environ.setdefault("TRITON_INTERPRET", "1")

FAULTS = TESTS / "faults"
LEFT_OUT = pytest.StashKey[int]()
TABLE = pytest.StashKey[FaultTable]()


@pytest.fixture
def large_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpoints of any model fit: the dry run of a large one needs no large disk here."""
    usage = shutil.disk_usage("/")
    plenty = usage._replace(free=10**16)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: plenty)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--faults", action="store_true", help="run all tests that show a fault case, and no others"
    )
    parser.addoption("--fast", action="store_true", help="run the fast tests only: make check")
    parser.addoption(
        "--fault_table",
        type=Path,
        help="file whose fault table is written anew; whole test files only",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TABLE] = FaultTable()


SLOW_TEST_SECONDS = 2400
"""Limit of a slow test and its fixtures, whose launches may take up to 1,800 seconds each."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(SLOW_TEST_SECONDS))
    if config.getoption("--fast"):
        kept = [item for item in items if is_fast(item.path) and not is_slow(item)]
    elif config.getoption("--faults"):
        kept = [item for item in items if item.get_closest_marker("case")]
        for item in kept:
            config.stash[TABLE].expect(file_of(item))
    elif config.getoption("markexpr") == "slow" or any(
        "faults" in a for a in config.invocation_params.args
    ):
        return
    else:
        kept = [item for item in items if not is_slow(item)]
    chosen = set(kept)
    left_out = [item for item in items if item not in chosen]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
    items[:] = sorted(kept, key=lambda item: is_short(item.path))
    config.stash[LEFT_OUT] = sum(is_slow(item) for item in left_out)


def pytest_collection_finish() -> None:
    """Freeze what the tests and the libraries have made so far.

    Building an engine collects garbage, which would walk all of it each time.
    """
    gc.collect()
    gc.freeze()


def is_short(path: Path) -> bool:
    """Whether the tests of a file come after the whole runs and clusters, which take longest.

    A worker that began with one of those at the end would work on while the other waits.
    """
    return path.relative_to(TESTS).parts[0] not in (*FOLDERS_LEFT_OUT, "gpu_rehearsal")


def is_slow(item: pytest.Item) -> bool:
    """Whether a test is left to `make faults` or `make prove`."""
    if FAULTS in item.path.parents:
        return item.get_closest_marker("quick") is None
    return item.get_closest_marker("slow") is not None


def pytest_sessionfinish(session: pytest.Session) -> None:
    if (
        output := getattr(session.config, "workeroutput", None)
    ) is not None:  # a worker of pytest-xdist
        output["left_out"] = session.config.stash.get(LEFT_OUT, 0)


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    """Take over what a worker left out; every worker collects, and leaves out, the same."""
    node.config.stash[LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Iterator[pytest.TestReport | None]:
    report = yield
    if (
        report.when == "call" or report.outcome != "passed"
    ):  # a fixture may fail or skip before the call
        reason = (
            report.longrepr[2].removeprefix("Skipped: ")
            if report.skipped and report.longrepr
            else ""
        )
        table = item.config.stash[TABLE]
        for mark in item.iter_markers("case"):
            table.add(file_of(item), *mark.args, report.outcome, reason)
    if report.when == "teardown" and item.get_closest_marker("case"):
        item.config.stash[TABLE].reported(file_of(item))
    return report


def file_of(item: pytest.Item) -> str:
    """Return the path of a test's file from the root of the repository."""
    return item.path.relative_to(item.config.rootpath).as_posix()


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    left_out = config.stash.get(LEFT_OUT, 0)
    if left_out:
        terminalreporter.write_line(f"{left_out} slow tests are left to: make faults, make prove")
    if config.getoption("--faults"):
        table = config.stash[TABLE]
        terminalreporter.write_line(table.markdown())
        terminalreporter.write_line(table.summary())
        chosen = config.getoption("keyword") or any("::" in a for a in config.args)
        if (path := config.getoption("--fault_table")) and not chosen:
            update(table).write(path)

"""The fault table of docs/reliability.md: for every case the fault, the outcome, and the checks.

`make faults` takes an hour. So the outcomes of every test file are kept in OUTCOMES with their
date and commit, a run of some files replaces theirs, and the table is made of all of them.
"""

from __future__ import annotations

import datetime
import json
import subprocess
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.support.cases import CASES, NOT_HERE

BEGIN, END = "<!-- fault table: written by make faults -->", "<!-- end of the fault table -->"

ROOT = Path(__file__).resolve().parent.parent.parent
OUTCOMES = ROOT / "tests" / "faults" / "outcomes.json"


@dataclass(kw_only=True)
class Evidence:
    """The outcomes of the tests of one case, in one file or in all."""

    checks: list[str] = field(default_factory=list)
    """Descriptions of what they check, without repetition."""
    passed: int = 0
    failed: int = 0
    skipped: list[str] = field(default_factory=list)
    """Reasons of skipped tests."""

    def add(self, other: Evidence) -> None:
        """Add the outcomes of other tests of the same case."""
        for check in other.checks:
            if check not in self.checks:
                self.checks.append(check)
        self.passed += other.passed
        self.failed += other.failed
        self.skipped += other.skipped

    def verdict(self, name: str) -> str:
        """Return the text of the column `survived`."""
        if self.failed:
            return f"**NO** ({self.failed} of {self.failed + self.passed} tests failed)"
        if self.passed and self.skipped:
            return f"yes ({len(self.skipped)} skipped: {self.skipped[0]})"
        if self.passed:
            return "yes"
        if self.skipped:
            return f"not run: {self.skipped[0]}"
        if name in NOT_HERE:
            return f"not run: {NOT_HERE[name]}"
        return "**no test**"


@dataclass(kw_only=True)
class FileOutcome:
    """The outcomes of one test file."""

    date: str
    """Day of the run, in UTC."""
    commit: str
    """The commit that was checked out."""
    cases: dict[str, Evidence] = field(default_factory=dict)


class FaultTable:
    """The outcomes of marked tests, by file and case."""

    def __init__(self) -> None:
        self.files: dict[str, FileOutcome] = {}
        self._expected: Counter[str] = Counter()
        self._reported: Counter[str] = Counter()

    def expect(self, file: str) -> None:
        """Note that one more test of a file will report its outcome."""
        self._expected[file] += 1

    def reported(self, file: str) -> None:
        """Note that a test of a file has reported its outcome."""
        self._reported[file] += 1

    def add(self, file: str, case: str, check: str, outcome: str, reason: str) -> None:
        """Note one test of one case: `passed`, `failed` or `skipped` (with its reason)."""
        assert case in CASES, f"case {case} is not in tests/support/cases.py"
        if file not in self.files:
            date = datetime.datetime.now(datetime.UTC).date().isoformat()
            self.files[file] = FileOutcome(date=date, commit=_commit())
        evidence = Evidence(checks=[check])
        if outcome == "skipped":
            evidence.skipped.append(reason)
        else:
            evidence.passed = int(outcome == "passed")
            evidence.failed = int(outcome == "failed")
        self.files[file].cases.setdefault(case, Evidence()).add(evidence)

    def finished(self) -> dict[str, FileOutcome]:
        """Return the outcomes of the files of which every expected test has reported."""
        found = {}
        for file, outcome in self.files.items():
            if self._reported[file] == self._expected[file]:
                found[file] = outcome
        return found

    def evidence(self) -> dict[str, Evidence]:
        """Return the outcomes of all files together, by case."""
        found = {name: Evidence() for name in CASES}
        for file in sorted(self.files):
            for case, evidence in self.files[file].cases.items():
                found[case].add(evidence)
        return found

    def markdown(self) -> str:
        """Return the table, one row per case, in the order of the catalog."""
        lines = ["| case | injected | survived | checked |", "|---|---|---|---|"]
        for name, evidence in self.evidence().items():
            checks = "; ".join(evidence.checks)
            lines.append(f"| {name} | {CASES[name]} | {evidence.verdict(name)} | {checks} |")
        return "\n".join(lines)

    def summary(self) -> str:
        """Return how many cases are shown, and when they were run, in one line."""
        num_survived = 0
        failed = []
        rest = []
        for name, evidence in self.evidence().items():
            if evidence.failed:
                failed.append(name)
            elif evidence.passed:
                num_survived += 1
            else:
                rest.append(name)
        return (
            f"{num_survived} of {len(CASES)} cases survived; failed: {failed or 'none'}; "
            f"not shown: {rest or 'none'}"
        )

    def days(self) -> str:
        """Return the first and the last day of the runs."""
        dates = sorted({outcome.date for outcome in self.files.values()})
        if not dates:
            return "never run"
        return dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"

    def write(self, path: Path) -> None:
        """Replace the table between the markers of a file."""
        text = path.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        _, _, after = rest.partition(END)
        assert after, f"{path} lacks the markers of the table"
        table = f"{BEGIN}\n\n{self.days()}: {self.summary()}.\n\n{self.markdown()}\n\n{END}"
        path.write_text(f"{before}{table}{after}", encoding="utf-8")


def update(run: FaultTable, path: Path = OUTCOMES) -> FaultTable:
    """Replace the outcomes of the files that were run, and return those of all files.

    Files that no longer exist are forgotten.
    """
    table = FaultTable()
    for file, outcome in {**_read(path), **run.finished()}.items():
        if (ROOT / file).exists():
            table.files[file] = outcome
    plain: dict[str, Any] = {}
    for file in sorted(table.files):
        plain[file] = asdict(table.files[file])
    path.write_text(json.dumps(plain, indent=1) + "\n", encoding="utf-8")
    return table


def _read(path: Path) -> dict[str, FileOutcome]:
    if not path.exists():
        return {}
    found = {}
    for file, plain in json.loads(path.read_text(encoding="utf-8")).items():
        cases = {name: Evidence(**evidence) for name, evidence in plain["cases"].items()}
        found[file] = FileOutcome(date=plain["date"], commit=plain["commit"], cases=cases)
    return found


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"

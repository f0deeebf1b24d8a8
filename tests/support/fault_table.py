"""The fault table of docs/reliability.md: for every case the fault, the outcome, and the checks."""

from __future__ import annotations

import datetime
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.cases import CASES, NOT_HERE

BEGIN, END = "<!-- fault table: written by make faults -->", "<!-- end of the fault table -->"


@dataclass(kw_only=True)
class Evidence:
    """The outcomes of the tests of one case."""

    checks: list[str] = field(default_factory=list)
    """Descriptions of what they check, without repetition."""
    passed: int = 0
    failed: int = 0
    skipped: list[str] = field(default_factory=list)
    """Reasons of skipped tests."""
    seconds: float = 0.0

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


class FaultTable:
    """The outcomes of all marked tests, by case."""

    def __init__(self) -> None:
        self.evidence: defaultdict[str, Evidence] = defaultdict(Evidence)

    def add(self, case: str, check: str, outcome: str, reason: str, seconds: float) -> None:
        """Note one test of one case: `passed`, `failed` or `skipped` (with its reason)."""
        assert case in CASES, f"case {case} is not in tests/support/cases.py"
        evidence = self.evidence[case]
        evidence.seconds += seconds
        if check not in evidence.checks:
            evidence.checks.append(check)
        if outcome == "skipped":
            evidence.skipped.append(reason)
        else:
            evidence.passed += outcome == "passed"
            evidence.failed += outcome == "failed"

    def markdown(self) -> str:
        """Return the table, one row per case, in the order of the catalog."""
        lines = ["| case | injected | survived | checked |", "|---|---|---|---|"]
        for name, injected in CASES.items():
            evidence = self.evidence[name]
            checks = "; ".join(evidence.checks)
            lines.append(f"| {name} | {injected} | {evidence.verdict(name)} | {checks} |")
        return "\n".join(lines)

    def summary(self) -> str:
        """Return how many cases are shown, in one line."""
        num_survived = 0
        failed = []
        rest = []
        for name in CASES:
            if self.evidence[name].failed:
                failed.append(name)
            elif self.evidence[name].passed:
                num_survived += 1
            else:
                rest.append(name)
        return (
            f"{num_survived} of {len(CASES)} cases survived; failed: {failed or 'none'}; "
            f"not shown: {rest or 'none'}"
        )

    def write(self, path: Path) -> None:
        """Replace the table between the markers of a file."""
        text = path.read_text(encoding="utf-8")
        before, _, rest = text.partition(BEGIN)
        _, _, after = rest.partition(END)
        assert after, f"{path} lacks the markers of the table"
        date = datetime.datetime.now(datetime.UTC).date().isoformat()
        table = f"{BEGIN}\n\n{date}: {self.summary()}.\n\n{self.markdown()}\n\n{END}"
        path.write_text(f"{before}{table}{after}", encoding="utf-8")

"""Rehearse scenarios in this process: python -m tests.support.gpu_rehearsal.rehearse OUT NAME..."""

from __future__ import annotations

from tests.support.gpu_rehearsal import fake_cuda

fake_cuda.install()

import json  # noqa: E402
import sys  # noqa: E402
import tempfile  # noqa: E402
import time  # noqa: E402
from pathlib import Path  # noqa: E402

from tests.support.gpu_rehearsal.scenario import Rehearsal, Scenario  # noqa: E402


def main() -> None:
    """Run every scenario of a JSON file and write what was found to another."""
    wanted = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    found = {}
    for values in wanted:
        scenario = Scenario(**values)
        started = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            found[scenario.name] = Rehearsal(scenario, Path(folder)).run()
        print(f"{scenario.name}: {time.monotonic() - started:.1f} s", flush=True)
    Path(sys.argv[2]).write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()

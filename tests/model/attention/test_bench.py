"""bench/attention.py runs from end to end, and memory grows no faster than the row.

The speed itself is not asserted: other processes on the machine decide it as much as the code.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from data_pipeline.charts import MUTED, PALETTE
from tests.support.launcher import ROOT

SCRIPT = ROOT / "bench" / "attention.py"
LINUX = Path("/proc/self/clear_refs").exists()


def run(arguments: list[str], **environment: str) -> list[str]:
    command = [sys.executable, str(SCRIPT), "--device", "cpu", "--threads", "1", *arguments]
    done = subprocess.run(
        command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **environment}
    )
    return done.stdout.splitlines()


@pytest.mark.skipif(not LINUX, reason="needs Linux to measure peak memory")
def test_peak_memory_grows_no_faster_than_the_row() -> None:
    """At 8,192 tokens and 2 heads the scores alone would be 256 MiB in bf16."""
    memory = {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "MALLOC_TOP_PAD_": "65536",
    }
    lengths = ["2048", "4096", "8192"]
    lines = run(
        ["--peak_of", "auto", "--heads", "2", "--kv_heads", "1", "--lengths", *lengths], **memory
    )
    found = [json.loads(line) for line in lines if line.startswith("{")]
    for kind in ("full", "window"):
        peaks = [result["peak_bytes"] for result in found if result["layer"] == kind]
        assert len(peaks) == len(lengths)
        for shorter, longer in itertools.pairwise(peaks):
            assert longer <= 2.3 * shorter, (kind, peaks)
        assert peaks[-1] < 2 * 8192**2 * 2 / 4, (kind, peaks)


def test_every_contender_is_measured_and_what_does_not_fit_is_told(tmp_path: Path) -> None:
    """Eager needs 0.1 MiB at 64 tokens and 75 MiB at 2,048; its allowance lies between."""
    arguments = [
        "--lengths",
        "64",
        "2048",
        "--heads",
        "2",
        "--kv_heads",
        "1",
        "--rounds",
        "1",
        "--eager_share",
        "1e-4",
    ]
    output = run(
        [
            *arguments,
            "--json",
            str(tmp_path / "a.json"),
            "--svg",
            str(tmp_path / "a.svg"),
            "--no_memory",
        ]
    )
    report = json.loads((tmp_path / "a.json").read_text())
    cases = [(result["layer"], result["tokens"]) for result in report["results"]]
    assert cases == [("full", 64), ("full", 2048), ("window", 64), ("window", 2048)]
    for result in report["results"]:
        measured = {"cpu", "no sinks"} | (
            {"Hugging Face eager"} if result["tokens"] == 64 else set()
        )
        assert set(result["ms"]) == measured and min(result["ms"].values()) > 0
        assert set(result["left out"]) == {"Hugging Face eager"} - measured
    assert sum("Hugging Face eager left out: needs about" in line for line in output) == 2
    drawing = (tmp_path / "a.svg").read_text()
    assert ET.fromstring(drawing).tag.endswith("svg")
    dots = re.findall(r"<use [^>]*fill: (#\w+); stroke: \1", drawing)
    # a dot for each time, in both panels; the ticks of the axes are drawn in the muted color, too
    assert dots.count(PALETTE[0]) == 2 * 2
    assert dots.count(PALETTE[5]) == 2 * 1
    assert dots.count(MUTED) >= 2 * 2

"""The figures of the last stage come from its real code, extrapolated by plain arithmetic."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench.prove import data_scale

ROOT = Path(__file__).parents[2]


def records(stage: str, seconds: tuple[float, float], memory: tuple[int, int]) -> list[dict]:
    found = []
    for size, cpu, own in zip((1_000_000, 10_000_000), seconds, memory, strict=True):
        found.append({"stage": stage, "size": size, "cpu_seconds": cpu, "own_bytes": own})
    return found


def test_growth_is_the_exponent_between_the_two_largest_sizes() -> None:
    found = records("near", (2.0, 40.0), (2**30, 2**30))
    assert data_scale.growth(found, "near", "cpu_seconds") == pytest.approx(1.301, abs=1e-3)
    assert data_scale.growth(found, "near", "own_bytes") == 0


def test_extrapolation_multiplies_the_largest_size_and_divides_by_cores() -> None:
    found = records("near", (36.0, 360.0), (2**30, 2**30))
    *_, row = data_scale.extrapolation(found)
    # 400 M documents are 40 times the largest size: 0.1 h * 40 on 16 and 256 cores
    assert row.startswith("| near | 1.00 | 0.00 |")
    assert row.endswith("| 4.00 h, 1.0 GiB, 0.25, 0.02 |")


@pytest.mark.slow
def test_stages_run_on_small_arrays_and_tell_their_figures(tmp_path: Path) -> None:
    out = tmp_path / "scale.json"
    command = [sys.executable, ROOT / "bench" / "prove" / "data_scale.py", "--out", out]
    words = ["--documents", "300000", "--stages", "exact", "near", "pack", "open"]
    subprocess.run([*command, *words, "--folder", tmp_path], check=True, capture_output=True)
    found = {record["stage"]: record for record in json.loads(out.read_text())["records"]}
    assert found["exact"]["not_trained_on"] > 2500  # a twentieth of the second part, and held out
    assert found["near"]["near_copies"] > 2000
    assert found["open"]["documents"] == 300_000

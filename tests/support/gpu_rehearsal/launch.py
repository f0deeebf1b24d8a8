"""Starts a rehearsal in a process of its own, and puts together what it counted."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tests.support.gpu_rehearsal.fake_cuda import GUARD_LIBRARY, build_guard
from tests.support.gpu_rehearsal.shapes import LAYERS_IN_TURN, LAYERS_OF_PRESET, Scenario

ROOT = Path(__file__).resolve().parents[3]

Parts = dict[str, dict[str, dict[str, float]]]
"""Part, phase (forward, recompute or backward), quantity."""


def rehearse(scenarios: Sequence[Scenario], folder: Path) -> dict[str, Any]:
    """Return what was found in each scenario, by name.

    Args:
        scenarios: Run one after another in one process.
        folder: Takes the compiled guard, and what goes to the process and comes back.
    """
    wanted = folder / "scenarios.json"
    found = folder / "found.json"
    wanted.write_text(json.dumps([asdict(scenario) for scenario in scenarios]), encoding="utf-8")
    environment = os.environ | {
        GUARD_LIBRARY: str(build_guard(folder)),
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        # The fake device is the only accelerator that anything may find.
        "DS_ACCELERATOR": "cpu",
        "CPT_FUSED_KERNELS": "1",
    }
    module = "tests.support.gpu_rehearsal.rehearse"
    command = [sys.executable, "-m", module, str(wanted), str(found)]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"the rehearsal ended with {done.returncode}:\n{done.stderr[-4000:]}")
    sys.stderr.write(done.stdout)
    result: dict[str, Any] = json.loads(found.read_text(encoding="utf-8"))
    return result


def whole_model(shape: Scenario, few: Parts, more: Parts) -> Parts:
    """Return the costs with all layers of the preset.

    Args:
        shape: The shape of `more`.
        few: What was counted with two layers.
        more: What was counted with `shape.layers`.
    """
    turns = LAYERS_OF_PRESET[shape.preset] / LAYERS_IN_TURN
    turns_more = shape.layers / LAYERS_IN_TURN - 1
    scaled: Parts = {}
    for part, phases in more.items():
        scaled[part] = {}
        for phase, quantities in phases.items():
            base = few.get(part, {}).get(phase, {})
            values = {}
            for name, counted in quantities.items():
                first = base.get(name, 0)
                value = first + (counted - first) / turns_more * (turns - 1)
                values[name] = value if name == "seconds" else round(value)
            scaled[part][phase] = values
    return scaled

"""A loss or gradient that is not finite on one rank changes no weight anywhere, in any ZeRO stage
and precision.

The run is compared, bit by bit, with one that never saw the two batches: the arithmetic is the
same.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest

from cpt.checkpoint.manifest import PARTS
from cpt.checkpoint.reader import step_folder
from tests.dist.cases import ROWS, Scenario, parameter_file, reference_model
from tests.dist.test_layout_parity import stored_tensors
from tests.support.launcher import ROOT, launch
from tests.support.tensors import differing

pytestmark = pytest.mark.dist

STEPS, LOSS, GRADIENT = 4, 1, 2
"""Planned steps; those at which rank 1's loss is NaN, and its gradient infinite while its loss is
finite.
"""
RUN = Scenario(world_size=2, sp=1, ep=2, stage=3, micro_batch_size=4, steps=STEPS)
# Stage 3 comes first: it patches torch's linear layer for the rest of the process, and the patched
# layer rounds bf16 otherwise.
POISONED = [
    dataclasses.replace(RUN, micro_batch_size=2),
    dataclasses.replace(RUN, dtype="bf16"),
    dataclasses.replace(RUN, sp=2, ep=1),
    dataclasses.replace(RUN, stage=1),
    dataclasses.replace(RUN, stage=2, dtype="bf16"),
]
OMITTING = [dataclasses.replace(scenario, omit=(LOSS, GRADIENT)) for scenario in POISONED]

Results = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("nonfinite")
    reference_model().save_pretrained(str(folder / "model"))
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    passes = 0  # each of them uses up one fault
    for scenario in POISONED:
        rows_per_pass = scenario.micro_batch_size * scenario.world_size // scenario.sp
        passes += ROWS // rows_per_pass
    faults = [f"forward:1:{LOSS + 1}:nan", f"gradient:1:{GRADIENT + 1}:inf"] * passes
    scenarios = POISONED + OMITTING
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CPT_ALLOW_FAULTS", "1")
        patch.setenv("CPT_FAULT", ",".join(faults))
        arguments = [str(folder), *(scenario.dump() for scenario in scenarios)]
        assert launch(ROOT / "tests" / "dist" / "worker.py", 2, arguments) == [0, 0]
    return {
        scenario.name: json.loads(parameter_file(folder, scenario).read_text())
        for scenario in scenarios
    }


@pytest.mark.case(
    "N1", "update skipped on all ranks, weights and moments bit-equal to a run that omits it"
)
@pytest.mark.case("N2", "the same: finite loss, norm not finite, in ZeRO 1 to 3, bf16 and fp32")
@pytest.mark.parametrize(
    ("poisoned", "omitting"), zip(POISONED, OMITTING, strict=True), ids=lambda s: s.name
)
def test_skipped_updates_leave_the_state_of_a_run_that_omits_them(
    poisoned: Scenario, omitting: Scenario, results: Results, folder: Path
) -> None:
    steps = results[poisoned.name]
    assert [number for number, step in enumerate(steps) if not step["applied"]] == [LOSS, GRADIENT]
    assert not math.isfinite(steps[LOSS]["loss"]) and math.isfinite(steps[GRADIENT]["loss"])
    assert not math.isfinite(steps[GRADIENT]["grad_norm"])
    finite = [step for number, step in enumerate(steps) if number not in (LOSS, GRADIENT)]
    assert finite == results[omitting.name]
    for part in PARTS:
        expected = stored_tensors(step_folder(folder / omitting.name, STEPS), part)
        got = stored_tensors(step_folder(folder / poisoned.name, STEPS), part)
        assert differing(expected, got) == []

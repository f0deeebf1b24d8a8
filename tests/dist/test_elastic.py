"""A checkpoint of one layout resumes any other; nothing is converted.

Tolerances as in test_layout_parity: fp32 sums in another order.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from cpt.checkpoint.metadata import PARTS
from cpt.checkpoint.reader import step_folder
from tests.dist.cases import Scenario, parameter_file
from tests.dist.test_layout_parity import Reference, stored_tensors
from tests.support.launcher import ROOT, launch

pytestmark = pytest.mark.dist

HALF, LAST = 4, 8
"""Saved after step 4; steps 5 to 8 are compared."""
FIRST = Scenario(world_size=4, sp=2, ep=2, stage=3, steps=HALF)
FIRST_STAGE1 = Scenario(world_size=2, sp=1, ep=2, stage=1, steps=HALF)
LAYOUTS = [
    (1, 1, 1, 3),
    (2, 2, 1, 3),
    (2, 1, 2, 3),
    (4, 4, 4, 3),
    (4, 1, 1, 3),
    (2, 1, 1, 2),
    (2, 1, 2, 1),
]
RESUMED = [
    Scenario(world_size=w, sp=s, ep=e, stage=z, start=HALF, steps=LAST, resume_from=FIRST.name)
    for w, s, e, z in LAYOUTS
] + [
    Scenario(
        world_size=2, sp=2, ep=1, stage=3, start=HALF, steps=LAST, resume_from=FIRST_STAGE1.name
    )
]
UNTOUCHED = Scenario(
    world_size=2, sp=1, ep=2, stage=2, start=HALF, steps=HALF, resume_from=FIRST.name
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elastic")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder, num_steps=LAST)


@pytest.fixture(scope="module")
def results(folder: Path, reference: Reference) -> dict[str, list[dict]]:  # type: ignore[type-arg]
    run(folder, [FIRST])
    run(folder, [FIRST_STAGE1])
    for world_size in (1, 2, 4):
        run(folder, [s for s in [*RESUMED, UNTOUCHED] if s.world_size == world_size])
    return {
        s.name: json.loads(parameter_file(folder, s).read_text()) for s in [*RESUMED, UNTOUCHED]
    }


def run(folder: Path, scenarios: list[Scenario]) -> None:
    world_size = scenarios[0].world_size
    arguments = [str(folder), *(scenario.dump() for scenario in scenarios)]
    assert launch(ROOT / "tests" / "dist" / "worker.py", world_size, arguments) == [0] * world_size


@pytest.mark.parametrize("scenario", RESUMED, ids=lambda s: s.name)
@pytest.mark.case("R2", "losses of steps 5-8 to 2e-5, norms to 1e-4")
@pytest.mark.case("R3", "losses of steps 5-8 to 2e-5, norms to 1e-4")
@pytest.mark.case("R6", "losses of steps 5-8 to 2e-5, norms to 1e-4")
def test_any_layout_goes_on_with_the_losses_of_the_run_that_never_changed(
    scenario, results, reference
) -> None:
    steps = results[scenario.name]
    losses = [
        abs(step["loss"] - expected)
        for step, expected in zip(steps, reference.losses[HALF:], strict=True)
    ]
    norms = [
        abs(step["grad_norm"] / expected - 1)
        for step, expected in zip(steps, reference.norms[HALF:], strict=True)
    ]
    assert len(steps) == LAST - HALF
    assert max(losses) <= 2e-5 and max(norms) <= 1e-4, (
        f"loss differences {losses}, relative norm differences {norms}"
    )


def test_loading_and_saving_without_a_step_keeps_every_bit_in_another_layout(
    results, folder: Path
) -> None:
    before, after = (
        step_folder(folder / FIRST.name, HALF),
        step_folder(folder / UNTOUCHED.name, HALF),
    )
    for part in PARTS:
        expected, got = stored_tensors(before, part), stored_tensors(after, part)
        assert [name for name in expected if not torch.equal(expected[name], got[name])] == []

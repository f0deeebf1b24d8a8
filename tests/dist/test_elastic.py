"""A checkpoint of one layout resumes any other; nothing is converted.

Tolerances as in test_layout_parity: fp32 sums in another order.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from cpt.checkpoint.manifest import PARTS
from cpt.checkpoint.reader import step_folder
from tests.dist.cases import Scenario, rows_of_two_passes
from tests.dist.test_layout_parity import (
    Reference,
    assert_alike,
    assert_same_tensors,
    key_of,
    run_together,
    stored,
)
from tests.support.checkpoints import as_format_1

pytestmark = pytest.mark.dist

HALF = 1
LAST = 3
"""The runs are saved after step 1, and steps 2 and 3 are compared: the loss of step 3 shows the
moments that step 2 went on with."""
FIRST = Scenario(world_size=4, sp=2, ep=2, stage=3, micro_batch_size=2, steps=HALF)
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
"""World size, SP, EP and ZeRO stage."""


def resumed(first: Scenario, layout: tuple[int, int, int, int], *, steps: int = LAST) -> Scenario:
    """Return the scenario that goes on with another one in some layout."""
    world_size, sp, ep, stage = layout
    return Scenario(
        world_size=world_size,
        sp=sp,
        ep=ep,
        stage=stage,
        micro_batch_size=rows_of_two_passes(world_size, sp),
        start=HALF,
        steps=steps,
        resume_from=first.name,
    )


OLD = resumed(FIRST_STAGE1, (1, 1, 1, 2))
"""Goes on from a checkpoint of format 1."""
RESUMED = [*(resumed(FIRST, layout) for layout in LAYOUTS), OLD]
UNTOUCHED = resumed(FIRST, (2, 1, 2, 2), steps=HALF)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("elastic")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder, num_steps=LAST)


@pytest.fixture(scope="module")
def results(folder: Path, reference: Reference) -> dict[str, list[dict[str, Any]]]:
    scenarios = [FIRST, FIRST_STAGE1, *RESUMED, UNTOUCHED]
    found = {}
    for world_size in (4, 2, 1):  # those that are resumed come first
        chosen = [scenario for scenario in scenarios if scenario.world_size == world_size]
        found.update(run_together(folder, chosen, world_size, timeout_seconds=300))
        if world_size == FIRST_STAGE1.world_size:  # old checkpoints are resumed, too
            as_format_1(step_folder(folder / FIRST_STAGE1.name, HALF))
    return found


@pytest.mark.parametrize("scenario", RESUMED, ids=lambda s: s.name)
@pytest.mark.case("R2", "losses after it to 2e-5, norms to 1e-4")
@pytest.mark.case("R3", "losses after it to 2e-5, norms to 1e-4")
@pytest.mark.case("R6", "losses after it to 2e-5, norms to 1e-4")
def test_any_layout_goes_on_with_the_losses_of_the_run_that_never_changed(
    scenario, results, reference
) -> None:
    steps = results[key_of(scenario)]
    assert len(steps) == LAST - HALF
    assert_alike(steps, reference.losses[HALF:], reference.norms[HALF:])


def test_loading_and_saving_without_a_step_keeps_every_bit_in_another_layout(
    results, folder: Path
) -> None:
    for part in PARTS:
        before = stored(folder, FIRST, part)
        after = stored(folder, UNTOUCHED, part)
        assert_same_tensors(before, after)

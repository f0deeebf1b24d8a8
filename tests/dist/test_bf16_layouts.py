"""The layouts in bf16 that test_layout_parity leaves out, because each takes seconds."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.dist.cases import Scenario
from tests.dist.test_layout_parity import (
    BF16_LAYOUTS,
    LAYOUTS,
    Reference,
    assert_alike,
    key_of,
    named,
    run_all,
)

pytestmark = [pytest.mark.dist, pytest.mark.slow]

SCENARIOS = []
for layout in LAYOUTS:
    if layout not in BF16_LAYOUTS:
        world_size, sp, ep, stage = layout
        SCENARIOS.append(
            Scenario(world_size=world_size, sp=sp, ep=ep, stage=stage, dtype="bf16", steps=3)
        )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bf16")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder, num_steps=3)


@pytest.fixture(scope="module")
def results(folder: Path, reference: Reference) -> dict[str, list[dict[str, object]]]:
    return run_all(folder, SCENARIOS)


@named(SCENARIOS)
def test_bf16_stays_within_its_rounding(scenario, results, reference) -> None:
    assert_alike(results[key_of(scenario)], reference.losses, reference.norms, bf16=True)

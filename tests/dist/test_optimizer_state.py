"""Moments in fewer bytes: every layout gives the numbers of one process with plain AdamW.

There a moment is rounded by the definition after each step (tests/support/narrow_reference.py). The
tolerances are those of tests/dist/test_layout_parity.py: a sum in another order may round a moment
to its neighbor, which moves few weights by a small part of a step.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cpt.checkpoint.manifest import PARTS
from tests.dist.cases import Scenario
from tests.dist.test_layout_parity import (
    FULL,
    Reference,
    assert_alike,
    assert_same_tensors,
    key_of,
    run_all,
    run_together,
    stored,
)
from tests.dist.test_offload import assert_same_steps

pytestmark = pytest.mark.dist

SHORT = 2
"""Steps of the cheap cases, of which the first is saved."""
BF16 = Scenario(
    world_size=2,
    sp=2,
    ep=1,
    stage=3,
    micro_batch_size=4,
    steps=SHORT,
    saves_first=True,
    optimizer_state="bf16",
)
INT8 = Scenario(
    world_size=2, sp=1, ep=2, stage=2, steps=SHORT, saves_first=True, optimizer_state="int8"
)
WRITTEN = [BF16, INT8]


def resumed(scenario: Scenario, source: Scenario) -> Scenario:
    """Return a scenario that goes on from the first step of another."""
    return replace(scenario, resume_from=source.name, start=1, saves_first=False)


SAME = [resumed(scenario, scenario) for scenario in WRITTEN]
OTHER = [resumed(BF16, INT8), resumed(replace(INT8, stage=1), BF16)]
"""Each goes on in the layout and with the setting of the other."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("optimizer_state")


@pytest.fixture(scope="module")
def references(folder: Path) -> dict[str, Reference]:
    forms = ("bf16", "int8")
    return {form: Reference(folder, num_steps=SHORT, moment_form=form) for form in forms}


@pytest.fixture(scope="module")
def results(folder: Path, references: dict[str, Reference]) -> dict[str, list[dict[str, Any]]]:
    """Results of the cheap cases."""
    return run_together(folder, [*WRITTEN, *SAME, *OTHER], 2, timeout_seconds=400)


@pytest.mark.parametrize("scenario", WRITTEN, ids=lambda s: s.name)
def test_losses_and_norms_are_those_of_one_process(scenario, results, references) -> None:
    reference = references[scenario.optimizer_state]
    assert_alike(results[key_of(scenario)], reference.losses, reference.norms)


@pytest.mark.parametrize("scenario", WRITTEN, ids=lambda s: s.name)
def test_moments_are_those_of_one_process(scenario, results, references, folder) -> None:
    """Few are rounded to a neighbor, because a sum was taken in another order."""
    reference = references[scenario.optimizer_state]
    unit = 2.0**-7 if scenario.optimizer_state == "bf16" else 2.0**-3
    for part, expected in reference.moments.items():
        found = stored(folder, scenario, part)
        for name, values in expected.items():
            scale = values.abs().clamp(min=float(values.abs().max()) * 1e-4)
            error = (found[name] - values).abs() / scale
            num_others = int((error > 0.5 * unit).sum())
            assert num_others <= max(1, values.numel() // 100), (part, name)


@pytest.mark.parametrize("scenario", SAME, ids=lambda s: s.name)
def test_a_resumed_run_repeats_every_bit(scenario, results, folder) -> None:
    (unbroken,) = [one for one in WRITTEN if one.name == scenario.resume_from]
    assert results[key_of(scenario)] == results[key_of(unbroken)][1:]
    for part in PARTS:
        assert_same_tensors(stored(folder, unbroken, part), stored(folder, scenario, part))


@pytest.mark.parametrize("scenario", OTHER, ids=lambda s: s.name)
def test_a_checkpoint_of_one_form_is_gone_on_from_in_another(scenario, results, references) -> None:
    """The loss of the second step does not depend on moments, but on the weights of the first."""
    (source,) = [one for one in WRITTEN if one.name == scenario.resume_from]
    reference = references[source.optimizer_state]
    assert_alike(results[key_of(scenario)], reference.losses[1:], reference.norms[1:])


TABLE = [
    replace(scenario, saves_first=False, optimizer_state=form)
    for form in ("bf16", "int8")
    for scenario in FULL
]
OFFLOADED = [
    replace(scenario, offloads={"optimizer": device})
    for scenario in TABLE[3::10]
    for device in ("cpu", "nvme")
]
FROZEN = [replace(scenario, freeze=("router", "model.layers.0.*")) for scenario in TABLE[3::10]]


@pytest.fixture(scope="module")
def table_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("optimizer_state_table")


@pytest.fixture(scope="module")
def table(table_folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Results of all layouts; the references are with them, as `bf16` and `int8`."""
    found: dict[str, Any] = {}
    for form in ("bf16", "int8"):
        found[f"frozen-{form}"] = Reference(table_folder, frozen=FROZEN[0].freeze, moment_form=form)
        found[form] = Reference(table_folder, moment_form=form)
    return {**found, **run_all(table_folder, [*TABLE, *OFFLOADED, *FROZEN])}


@pytest.mark.slow
@pytest.mark.parametrize("scenario", [*TABLE, *OFFLOADED, *FROZEN], ids=lambda s: s.name)
def test_every_layout_gives_the_losses_and_norms_of_one_process(scenario, table) -> None:
    key = f"frozen-{scenario.optimizer_state}" if scenario.freeze else scenario.optimizer_state
    assert_alike(table[key_of(scenario)], table[key].losses, table[key].norms)


@pytest.mark.slow
def test_state_in_files_and_on_the_host_changes_no_bit(table, table_folder) -> None:
    for on_device in TABLE[3::10]:
        for device in ("cpu", "nvme"):
            offloaded = replace(on_device, offloads={"optimizer": device})
            assert_same_steps(table[key_of(offloaded)], table[key_of(on_device)])
            for part in PARTS:
                expected = stored(table_folder, on_device, part)
                assert_same_tensors(expected, stored(table_folder, offloaded, part))

"""Offloading configurations train, save and resume bit for bit as the one that offloads nothing.

There is no tolerance: state that waits on the host is updated by the same kernel, and where a
tensor waits rounds nothing.  Only the norm's squares are added up in another order (1e-6), which
changes no gradient, since none is clipped here.  ZeRO-2 sums gradients in another order than
ZeRO-3; there the tolerances are those of test_layout_parity.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cpt.checkpoint.manifest import PARTS
from tests.dist.cases import CLIPPING, STEPS, Scenario, parameter_file, reference_model
from tests.dist.test_layout_parity import assert_alike, assert_same_tensors, named, stored
from tests.support.launcher import ROOT, launch

pytestmark = [pytest.mark.dist, pytest.mark.slow]

NOTHING = "z3_ep.json"
OPTIMIZER = "z3_offload_cpu.json"
ALL = "z3_offload_cpu_all.json"
NVME = "z3_offload_nvme.json"


def offloading(
    ds_config: str, steps: int, *, stage: int = 3, resumes: Scenario | None = None
) -> Scenario:
    return Scenario(
        world_size=2,
        sp=1,
        ep=2,
        stage=stage,
        micro_batch_size=2,
        ds_config=ds_config,
        steps=steps,
        resume_from=resumes.name if resumes else "",
        start=resumes.steps if resumes else 0,
    )


PLAIN = offloading(NOTHING, STEPS)
FIRST = offloading(OPTIMIZER, STEPS // 3)
SECOND = offloading(ALL, 2 * STEPS // 3, resumes=FIRST)
THIRD = offloading(NOTHING, STEPS, resumes=SECOND)
"""One run, each third under another configuration.

What goes wrong in any of them is in the last one's state.
"""
ON_FILES = offloading(NVME, STEPS // 3)
BACK = offloading(NOTHING, 2 * STEPS // 3, resumes=ON_FILES)
AGAIN_ON_FILES = offloading(NVME, STEPS, resumes=BACK)
FROZEN = replace(offloading(NOTHING, 2), freeze=("experts", "router"))
FROZEN_ON_FILES = replace(offloading(NVME, 2), freeze=("experts", "router"))
IN_BF16 = replace(offloading("", 2), dtype="bf16")
PLACES_IN_BF16 = [
    replace(IN_BF16, offloads={"optimizer": "nvme", "param": "nvme"}, sub_group_size=20_000),
    replace(IN_BF16, offloads={"optimizer": "nvme"}),
    replace(IN_BF16, offloads={"param": "nvme"}),
    replace(IN_BF16, offloads={"optimizer": "nvme", "param": "cpu"}),
    replace(IN_BF16, offloads={"optimizer": "cpu", "param": "nvme"}, freeze=("experts",)),
]
FROZEN_IN_BF16 = replace(IN_BF16, freeze=("experts",))
STAGE2 = offloading(OPTIMIZER, STEPS // 3, stage=2)
CLIPPED = replace(IN_BF16, offloads={"optimizer": "cpu"}, clipping=0.05, steps=STEPS)
ON_DEVICE = [
    replace(offloading(OPTIMIZER, STEPS), gradients="device"),
    replace(IN_BF16, offloads={"optimizer": "cpu"}, gradients="device", sub_group_size=20_000),
    replace(IN_BF16, offloads={"optimizer": "nvme"}, gradients="device"),
    replace(IN_BF16, offloads={"optimizer": "cpu", "param": "cpu"}, gradients="device"),
    replace(CLIPPED, gradients="device"),
    replace(CLIPPED, gradients="device", sub_group_size=20_000),
]
"""ZeRO-3 with gradients on the device."""
OF_ZERO_1_AND_2 = []
for stage, dtype in ((2, "bf16"), (2, "fp32"), (1, "bf16"), (1, "fp32")):
    nothing = Scenario(
        world_size=2, sp=1, ep=2, stage=stage, dtype=dtype, micro_batch_size=1, clipping=0.05
    )
    on_host = replace(nothing, offloads={"optimizer": "cpu"})
    OF_ZERO_1_AND_2.append((nothing, on_host))
    if stage == 2:
        OF_ZERO_1_AND_2.append((nothing, replace(on_host, gradients="device")))
"""(Scenario that offloads nothing, scenario with the same arithmetic), four micro steps each."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("offload")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, list[dict[str, Any]]]:
    reference_model().save_pretrained(str(folder / "model"))
    scenarios = [PLAIN, FIRST, SECOND, THIRD, ON_FILES, BACK, AGAIN_ON_FILES]
    scenarios += [FROZEN, FROZEN_ON_FILES, STAGE2, IN_BF16, FROZEN_IN_BF16, *PLACES_IN_BF16]
    scenarios += [CLIPPED, *ON_DEVICE]
    scenarios += {one.name: one for pair in OF_ZERO_1_AND_2 for one in pair}.values()
    arguments = [str(folder), *(scenario.dump() for scenario in scenarios)]
    assert launch(ROOT / "tests" / "dist" / "worker.py", 2, arguments) == [0, 0]
    return {s.name: json.loads(parameter_file(folder, s).read_text()) for s in scenarios}


@named([FIRST, SECOND, THIRD, ON_FILES, BACK, AGAIN_ON_FILES])
def test_every_step_equals_that_of_a_run_that_offloads_nothing(scenario, results) -> None:
    expected = results[PLAIN.name][scenario.start : scenario.steps]
    assert all(step["grad_norm"] < CLIPPING for step in expected)
    assert_same_steps(results[scenario.name], expected)


@named(PLACES_IN_BF16)
def test_wherever_state_waits_the_working_dtype_trains_the_same_bits(
    scenario, results, folder
) -> None:
    plain = FROZEN_IN_BF16 if scenario.freeze else IN_BF16
    assert_same_steps(results[scenario.name], results[plain.name])
    assert_same_bits(folder, plain, scenario)


@named(ON_DEVICE)
def test_gradients_on_the_device_train_the_same_bits_as_on_the_host(
    scenario, results, folder
) -> None:
    """The norm is summed in the same parts on a CPU, so clipping changes nothing either."""
    plain = CLIPPED if scenario.clipping != CLIPPING else IN_BF16
    if scenario.dtype == "fp32":
        plain = PLAIN
    assert_same_steps(results[scenario.name], results[plain.name])
    if scenario.sub_group_size == 0 or plain is not CLIPPED:
        assert_same_bits(folder, plain, scenario)


def test_gradients_of_zero_2_train_the_same_bits_in_both_places(results, folder) -> None:
    for dtype in ("bf16", "fp32"):
        on_host, on_device = [
            found for _, found in OF_ZERO_1_AND_2 if (found.stage, found.dtype) == (2, dtype)
        ]
        assert results[on_host.name] == results[on_device.name]
        assert_same_bits(folder, on_host, on_device)


@pytest.mark.parametrize("place", ["host", "device"])
def test_dropped_update_of_offloaded_zero_2_leaves_no_gradient_behind(
    place, folder, results, monkeypatch
) -> None:
    """DeepSpeed 0.19.8 alone adds the next step's gradients to those that were dropped."""
    monkeypatch.setenv("CPT_ALLOW_FAULTS", "1")
    monkeypatch.setenv("CPT_FAULT", "gradient:1:2:inf,gradient:1:2:inf")
    scenario = replace(
        IN_BF16, stage=2, offloads={"optimizer": "cpu"}, gradients=place, steps=3, weight_decay=0.2
    )
    arguments = [str(folder), scenario.dump()]
    assert launch(ROOT / "tests" / "dist" / "worker.py", 2, arguments) == [0, 0]
    steps = json.loads(parameter_file(folder, scenario).read_text())
    assert [step["applied"] for step in steps] == [True, False, True]
    assert steps[2]["grad_norm"] == pytest.approx(0.29, rel=0.05)


@pytest.mark.parametrize(("expected", "found"), OF_ZERO_1_AND_2, ids=lambda one: one.name)
def test_offloaded_gradients_of_zero_1_and_2_are_those_that_stay_on_the_device(
    expected, found, results, folder
) -> None:
    """Clipped by norms that differ by 1e-7, so weights do by less than 1e-5."""
    assert all(step["grad_norm"] > 0.05 for step in results[expected.name])
    for step, plain in zip(results[found.name], results[expected.name], strict=True):
        assert step["loss"] == pytest.approx(plain["loss"], rel=1e-6)
        assert step["grad_norm"] == pytest.approx(plain["grad_norm"], rel=1e-5)


@pytest.mark.parametrize(
    ("expected", "found"), [(PLAIN, THIRD), (PLAIN, AGAIN_ON_FILES), (FROZEN, FROZEN_ON_FILES)]
)
def test_state_saved_and_resumed_under_offload_ends_in_the_same_bits(
    expected, found, results, folder
) -> None:
    assert_same_bits(folder, expected, found)


def assert_same_steps(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> None:
    """Assert that steps are equal; only the norm's squares are added up in another order."""
    for step, plain in zip(found, expected, strict=True):
        assert step == {**plain, "grad_norm": pytest.approx(plain["grad_norm"], rel=1e-6)}


def assert_same_bits(folder: Path, plain: Scenario, offloaded: Scenario) -> None:
    for part in PARTS:
        assert_same_tensors(stored(folder, plain, part), stored(folder, offloaded, part))


@named([ON_FILES, AGAIN_ON_FILES, FROZEN_ON_FILES, *PLACES_IN_BF16])
def test_state_on_nvme_is_in_files_after_the_last_step_as_much_as_planned(
    scenario, results, folder
) -> None:
    """Files take whole pages of 4,096 bytes, and the last ranks hold padding."""
    parts = {"optimizer": {"gradients", "optimizer"}, "param": {"weights"}}
    devices = scenario.offloads or {"optimizer": "nvme", "param": "nvme"}
    elsewhere: set[str] = set()
    for what, of_state in parts.items():
        if devices.get(what) != "nvme":
            elsewhere |= of_state
    files = json.loads((folder / f"{scenario.name}.files.json").read_text())
    assert [set(rank["outside"]) for rank in files["by_rank"]] == [elsewhere, elsewhere]
    for rank in files["by_rank"]:
        assert rank["bytes"] == pytest.approx(files["planned_bytes"], abs=2 * 4096, rel=0.01)
    assert list((folder / "nvme" / scenario.name).iterdir()) == [], "files without a name"


def test_optimizer_on_the_host_under_zero_2_trains_alike(results) -> None:
    found = results[STAGE2.name]
    expected = results[PLAIN.name][: STAGE2.steps]
    losses = [step["loss"] for step in expected]
    norms = [step["grad_norm"] for step in expected]
    assert_alike(found, losses, norms)

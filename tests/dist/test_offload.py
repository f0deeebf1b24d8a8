"""The shipped offloading configurations train, save and resume bit for bit as the one that offloads nothing.

No tolerance: state that waits on the host is updated by the same kernel, and where a tensor waits rounds nothing.
Only the norm's squares are added up in another order (1e-6), which changes no gradient, since none is clipped here.
ZeRO-2 sums gradients in another order than ZeRO-3; there the tolerances are those of test_layout_parity.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from cpt.state.stored import PARTS
from tests.dist.cases import CLIPPING, STEPS, Scenario, parameter_file, reference_model
from tests.dist.test_layout_parity import named, stored
from tests.support.launcher import ROOT, launch

pytestmark = [pytest.mark.dist, pytest.mark.slow]

NOTHING, OPTIMIZER, ALL = "z3_ep.json", "z3_offload_cpu.json", "z3_offload_cpu_all.json"
NVME = "z3_offload_nvme.json"


def offloading(ds_config: str, steps: int, *, stage: int = 3, resumes: Scenario | None = None) -> Scenario:
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
"""One run, each third under another configuration: what is wrong in any of them is in the last one's state."""
ON_FILES = offloading(NVME, STEPS // 3)
BACK = offloading(NOTHING, 2 * STEPS // 3, resumes=ON_FILES)
AGAIN_ON_FILES = offloading(NVME, STEPS, resumes=BACK)
FROZEN, FROZEN_ON_FILES = (
    dataclasses.replace(offloading(ds_config, 2), freeze=("experts", "router")) for ds_config in (NOTHING, NVME)
)
STAGE2 = offloading(OPTIMIZER, STEPS // 3, stage=2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("offload")


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, list[dict]]:  # type: ignore[type-arg]
    reference_model().save_pretrained(str(folder / "model"))
    scenarios = [PLAIN, FIRST, SECOND, THIRD, ON_FILES, BACK, AGAIN_ON_FILES, FROZEN, FROZEN_ON_FILES, STAGE2]
    arguments = [str(folder), *(scenario.dump() for scenario in scenarios)]
    assert launch(ROOT / "tests" / "dist" / "worker.py", 2, arguments) == [0, 0]
    return {s.name: json.loads(parameter_file(folder, s).read_text()) for s in scenarios}


@named([FIRST, SECOND, THIRD, ON_FILES, BACK, AGAIN_ON_FILES])
def test_every_step_equals_that_of_a_run_that_offloads_nothing(scenario, results) -> None:
    expected = results[PLAIN.name][scenario.start : scenario.steps]
    assert all(step["grad_norm"] < CLIPPING for step in expected)
    assert results[scenario.name] == [
        {**step, "grad_norm": pytest.approx(step["grad_norm"], rel=1e-6)} for step in expected
    ]


@pytest.mark.parametrize(("expected", "found"), [(PLAIN, THIRD), (PLAIN, AGAIN_ON_FILES), (FROZEN, FROZEN_ON_FILES)])
def test_state_saved_and_resumed_under_offload_ends_in_the_same_bits(expected, found, results, folder) -> None:
    scenarios = expected, found
    for part in PARTS:
        expected, found = (stored(folder, scenario, part) for scenario in scenarios)
        errors = {name: float((found[name] - tensor).abs().max()) for name, tensor in expected.items()}
        assert [name for name in expected if not torch.equal(expected[name], found[name])] == [], errors


@named([ON_FILES, AGAIN_ON_FILES, FROZEN_ON_FILES])
def test_state_on_nvme_lies_in_files_after_every_step_and_they_have_no_name(scenario, results, folder) -> None:
    outside = json.loads((folder / f"{scenario.name}.outside.json").read_text())
    assert outside == [[], []], "parts of each rank's state that are in other memory"
    assert list((folder / "nvme").iterdir()) == []


def test_optimizer_on_the_host_under_zero_2_trains_alike(results) -> None:
    pairs = list(zip(results[STAGE2.name], results[PLAIN.name][: STAGE2.steps], strict=True))
    losses = [abs(a["loss"] - b["loss"]) for a, b in pairs]
    norms = [abs(a["grad_norm"] / b["grad_norm"] - 1) for a, b in pairs]
    assert max(losses) <= 2e-5 and max(norms) <= 1e-4, f"loss differences {losses}, relative norm differences {norms}"

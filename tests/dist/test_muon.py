"""Every layout trains with Muon as one process does, matrix by matrix (support/plain_muon.py).

Layouts take fp32 sums in another order, and orthogonalizing makes differences of weak directions
up to 485 times as large (cpt/training/newton_schulz.py).  The tolerances allow for that: 2e-5 in
loss, 2e-5 relative in the norm, and a thousandth of the learning rate in each weight of a matrix.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cpt.checkpoint.reader import step_folder
from cpt.model.freezing import freeze
from tests.dist.cases import (
    CLIPPING,
    SETTINGS,
    STEPS,
    Scenario,
    reference_model,
    rows_of_two_passes,
)
from tests.dist.test_layout_parity import (
    assert_same_tensors,
    backward_of_step,
    key_of,
    loss_differences,
    named,
    norm_differences,
    run_all,
    stored_tensors,
)
from tests.support.plain_muon import PlainMuon

pytestmark = pytest.mark.dist

TIMEOUT_SECONDS = 600
"""For the launch of one world size."""
OF_A_WEIGHT = 1e-3
"""Largest difference of a matrix's weight after the first step, in learning rates."""
FROZEN = ("model.layers.0.*", "router")
BASE = Scenario(
    world_size=2, sp=1, ep=2, stage=3, micro_batch_size=2, saves_first=True, optimizer="muon"
)
SHARED_EXPERTS = replace(BASE, sp=2, ep=1, micro_batch_size=4)
QUICK = [
    SHARED_EXPERTS,
    replace(BASE, stage=1),
    replace(BASE, ep=1, stage=2, micro_batch_size=1, freeze=FROZEN),
]
"""In `make test`: matrices cut anywhere, experts that stay where they are, experts that are shared
by two ranks, frozen ones, accumulation."""
LAYOUTS = [(1, 1, 1, 3), (2, 2, 1, 3), (4, 2, 2, 3), (4, 1, 1, 3), (4, 4, 4, 3)]
LAYOUTS += [(1, 1, 1, 1), (2, 1, 1, 1), (4, 1, 2, 1), (4, 2, 2, 2), (4, 1, 1, 2)]
TABLE = [
    replace(
        BASE,
        world_size=world_size,
        sp=sp,
        ep=ep,
        stage=stage,
        micro_batch_size=rows_of_two_passes(world_size, sp),
        checkpointing=True,
    )
    for world_size, sp, ep, stage in LAYOUTS
]
TABLE += [
    replace(BASE, sub_group_size=20_000, freeze=FROZEN),
    replace(BASE, offloads={"optimizer": "cpu"}, sub_group_size=20_000),
    replace(BASE, offloads={"optimizer": "cpu", "param": "cpu"}, ep=1),
    replace(BASE, offloads={"optimizer": "nvme", "param": "nvme"}),
    replace(BASE, offloads={"optimizer": "cpu"}, stage=2),
]
FIRST = replace(BASE, world_size=4, sp=2, steps=1)
RESUMED = [
    replace(BASE, world_size=1, ep=1, micro_batch_size=4, start=1, resume_from=FIRST.name),
    replace(BASE, sp=2, ep=1, stage=1, start=1, resume_from=FIRST.name),
]
BY_ADAMW = replace(BASE, optimizer="adamw", steps=1)
GOES_OVER = replace(BASE, start=1, resume_from=BY_ADAMW.name)
GOES_BACK = replace(BASE, optimizer="adamw", start=STEPS, resume_from=GOES_OVER.name)


class Reference:
    """Losses, gradient norms and weights of one process."""

    def __init__(self, freezes: tuple[str, ...] = (), *, begins_with_adamw: bool = False) -> None:
        torch.set_num_threads(1)
        model = reference_model()
        freeze(model, freezes)
        optimizer = PlainMuon(model, SETTINGS)
        self.losses = []
        self.norms = []
        for step in range(STEPS):
            loss, _ = backward_of_step(model, step)
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
            if step == 0 and begins_with_adamw:
                optimizer.step_of_adamw()
            else:
                optimizer.step()
            self.losses.append(loss)
            self.norms.append(float(norm))
            if step == 0:
                self.first_means = {name: mean.clone() for name, mean in optimizer.means.items()}
                self.first_weights = {n: p.detach().clone() for n, p in model.named_parameters()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("muon")
    reference_model().save_pretrained(str(folder / "model"))
    return folder


@pytest.fixture(scope="module")
def references() -> dict[tuple[str, ...], Reference]:
    return {freezes: Reference(freezes) for freezes in ((), FROZEN)}


@pytest.fixture(scope="module")
def resumed(folder: Path) -> dict[str, list[dict[str, Any]]]:
    run_all(folder, [FIRST, BY_ADAMW], timeout_seconds=TIMEOUT_SECONDS)
    following = [*RESUMED, GOES_OVER, GOES_BACK]
    return run_all(folder, following, timeout_seconds=TIMEOUT_SECONDS)


@pytest.fixture(scope="module")
def quick(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return run_all(folder, QUICK, timeout_seconds=TIMEOUT_SECONDS)


@pytest.fixture(scope="module")
def table(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return run_all(folder, TABLE, timeout_seconds=TIMEOUT_SECONDS)


def assert_steps(reference: Reference, steps: list[dict[str, Any]], start: int = 0) -> None:
    """Assert that the steps from one on have the losses and norms of the reference."""
    by_loss = loss_differences(steps, reference.losses[start:])
    by_norm = norm_differences(steps, reference.norms[start:])
    told = f"loss differences {by_loss}, relative norm differences {by_norm}"
    assert max(by_loss) <= 2e-5, told
    assert max(by_norm) <= 2e-5, told


def assert_trained_as(reference: Reference, scenario: Scenario, steps: Any, folder: Path) -> None:
    """Assert that all steps, and every weight and momentum of the first, are the reference's."""
    assert_steps(reference, steps)
    first = step_folder(folder / scenario.name, 1)
    weights = stored_tensors(first, "master")
    means = stored_tensors(first, "exp_avg")
    errors = {}
    for name, expected in reference.first_means.items():
        error = (weights[name] - reference.first_weights[name]).abs().max()
        errors[name] = float(error) / SETTINGS["lr"]
        scale = expected.norm().clamp(min=1e-9)
        assert float((means[name] - expected).norm() / scale) <= 1e-4, name
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= OF_A_WEIGHT, f"{worst} differs by {errors[worst]} learning rates"
    for name, expected in reference.first_weights.items():
        error = (weights[name] - expected).abs().mean()
        assert float(error) <= 0.01 * SETTINGS["lr"], name


@named(QUICK)
def test_layouts_train_with_muon_as_one_process(scenario, quick, references, folder) -> None:
    reference = references[scenario.freeze]
    assert_trained_as(reference, scenario, quick[key_of(scenario)], folder)


@pytest.mark.slow
@named(TABLE)
def test_every_layout_and_place_trains_with_muon_as_one_process(
    scenario, table, references, folder
) -> None:
    reference = references[scenario.freeze]
    assert_trained_as(reference, scenario, table[key_of(scenario)], folder)


@pytest.mark.slow
def test_the_same_layout_makes_the_same_bits(table, folder) -> None:
    scenario = next(one for one in TABLE if one.world_size == 4 and one.ep == 2)
    last = step_folder(folder / scenario.name, STEPS)
    before = {part: stored_tensors(last, part) for part in ("master", "exp_avg")}
    run_all(folder, [scenario], timeout_seconds=TIMEOUT_SECONDS)
    for part, tensors in before.items():
        assert_same_tensors(tensors, stored_tensors(last, part))


@pytest.mark.slow
@named(RESUMED)
def test_any_layout_goes_on_with_the_momentum_of_another(scenario, resumed, references) -> None:
    assert_steps(references[()], resumed[key_of(scenario)], start=1)


@pytest.mark.slow
def test_a_run_that_goes_over_from_adamw_keeps_its_first_moment(resumed) -> None:
    reference = Reference(begins_with_adamw=True)
    assert_steps(reference, resumed[key_of(GOES_OVER)], start=1)


@pytest.mark.slow
def test_a_run_that_goes_back_to_adamw_begins_with_no_moments_of_matrices(resumed, folder) -> None:
    """Those of the parameters that were AdamW's all the time go on."""
    before = step_folder(folder / GOES_OVER.name, STEPS)
    after = step_folder(folder / GOES_BACK.name, STEPS)
    assert_same_tensors(stored_tensors(before, "master"), stored_tensors(after, "master"))
    kept = stored_tensors(before, "exp_avg_sq")
    for part in ("exp_avg", "exp_avg_sq"):
        old = stored_tensors(before, part)
        for name, tensor in stored_tensors(after, part).items():
            expected = old[name] if name in kept else torch.zeros_like(tensor)
            assert torch.equal(tensor, expected), (part, name)

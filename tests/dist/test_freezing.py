"""Frozen parameters stay as they are, bit for bit, and the others train as one process trains them.

Tolerances as in test_layout_parity: fp32 sums in another order.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cpt.checkpoint.manifest import read_manifest
from cpt.checkpoint.reader import read_weights, step_folder
from cpt.export.huggingface import export_checkpoint
from cpt.model.freezing import frozen_names
from tests.dist.cases import Scenario, model_config, parameter_file
from tests.dist.test_layout_parity import Reference, assert_alike
from tests.support.launcher import ROOT, launch

pytestmark = pytest.mark.dist

FROZEN = (
    "router",
    "sinks",
    "embeddings",
    "lm_head",
    "norms",
    "model.layers.0",
    "model.layers.2.mlp.experts.*_bias",
)
OTHERS = ("attention", "model.layers.1.mlp.experts.down_proj")
HALF = 1
STEPS = 2
FIRST = Scenario(world_size=2, sp=1, ep=2, stage=3, micro_batch_size=2, freeze=FROZEN, steps=HALF)
LAYOUTS = [
    FIRST,
    replace(FIRST, sp=2, ep=1, micro_batch_size=2, checkpointing=True),
    replace(FIRST, stage=2),
]
SECOND_HALF = replace(FIRST, start=HALF, steps=STEPS, resume_from=FIRST.name)
RESUMED = replace(SECOND_HALF, sp=2, ep=2, stage=1)
CHANGED = [
    replace(SECOND_HALF, freeze=OTHERS, ep=1, stage=3),
    replace(SECOND_HALF, freeze=OTHERS, ep=2, stage=2),
]
BF16 = replace(FIRST, dtype="bf16")
NO_EXPERT = replace(FIRST, freeze=("experts",), stage=2)
"""DeepSpeed's ZeRO 1 and 2 refuse expert layers of which no expert is trained."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("freezing")


@pytest.fixture(scope="module")
def reference(folder: Path) -> Reference:
    return Reference(folder, frozen=FROZEN, num_steps=STEPS)


@pytest.fixture(scope="module")
def results(folder: Path, reference: Reference) -> dict[str, list[dict[str, Any]]]:
    scenarios = [*LAYOUTS, RESUMED, *CHANGED, BF16, NO_EXPERT]
    arguments = [str(folder), *(scenario.dump() for scenario in scenarios)]
    assert launch(ROOT / "tests" / "dist" / "worker.py", 2, arguments) == [0, 0]
    return {s.name: json.loads(parameter_file(folder, s).read_text()) for s in scenarios}


def weights_of(step: Path) -> dict[str, torch.Tensor]:
    manifest = read_manifest(step)
    return read_weights(step, sorted(manifest.tensors), manifest)


def frozen_in(scenario: Scenario, names: list[str]) -> set[str]:
    return frozen_names(scenario.freeze, names)


@pytest.mark.parametrize("scenario", [*LAYOUTS, RESUMED], ids=lambda s: s.name)
def test_losses_and_norms_are_those_of_one_process_with_the_same_parameters_frozen(
    scenario, results, reference
) -> None:
    span = slice(scenario.start, scenario.steps)
    steps = results[scenario.name]
    assert_alike(steps, reference.losses[span], reference.norms[span])


@pytest.mark.parametrize("scenario", [*LAYOUTS, RESUMED, BF16], ids=lambda s: s.name)
def test_frozen_parameters_are_unchanged_bit_for_bit_and_all_others_changed(
    scenario, results, folder
) -> None:
    before = load_file(folder / "model" / "model.safetensors")
    if scenario.dtype == "bf16":
        before = {name: value.bfloat16().float() for name, value in before.items()}
    after = weights_of(step_folder(folder / scenario.name, scenario.steps))
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert 0 < len(unchanged) < len(before)
    assert unchanged == frozen_in(scenario, list(before))


def test_all_experts_may_be_frozen_under_zero_2(results, reference, folder) -> None:
    assert results[NO_EXPERT.name][0]["loss"] == pytest.approx(reference.losses[0], abs=2e-5)
    tensors = read_manifest(step_folder(folder / NO_EXPERT.name, HALF)).tensors
    untrained = {name for name, record in tensors.items() if not record.trained}
    assert untrained == frozen_in(NO_EXPERT, list(tensors))


def test_checkpoint_holds_no_moments_of_frozen_parameters(results, folder: Path) -> None:
    tensors = read_manifest(step_folder(folder / FIRST.name, HALF)).tensors
    untrained = {name for name, record in tensors.items() if not record.trained}
    assert untrained == frozen_in(FIRST, list(tensors))


@pytest.mark.parametrize("scenario", CHANGED, ids=lambda s: s.name)
def test_run_goes_on_with_another_freeze_set(scenario, results, reference, folder: Path) -> None:
    before = weights_of(step_folder(folder / FIRST.name, HALF))
    after = weights_of(step_folder(folder / scenario.name, STEPS))
    unchanged = {name for name in before if torch.equal(before[name], after[name])}
    assert unchanged == frozen_in(scenario, list(before))
    assert results[scenario.name][0]["loss"] == pytest.approx(reference.losses[HALF], abs=2e-5)
    norms = [results[other.name][0]["grad_norm"] for other in CHANGED]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_export_holds_the_frozen_parameters_as_they_were(results, folder: Path) -> None:
    out = export_checkpoint(step_folder(folder / RESUMED.name, STEPS), folder / "out", "fp32")
    before = load_file(folder / "model" / "model.safetensors")
    after = load_file(out / "model.safetensors")
    layers = range(model_config().num_hidden_layers)
    names = frozen_in(FIRST, [f"model.layers.{i}.self_attn.sinks" for i in layers])
    assert names and all(torch.equal(before[name], after[name]) for name in names)

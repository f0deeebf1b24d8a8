"""Experts in halves train as undivided ones do, bit for bit, with ZeRO and checkpointing.

tests/model/test_expert_overlap.py has more cases and the order of issue, without processes.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cpt.checkpoint.manifest import read_manifest
from cpt.checkpoint.reader import read_weights, step_folder
from tests.dist.cases import Scenario, parameter_file, reference_model
from tests.support.launcher import ROOT, launch

pytestmark = pytest.mark.dist

STEPS = 2
PLAIN = Scenario(world_size=2, sp=1, ep=2, stage=3, micro_batch_size=2, steps=STEPS, expert_size=96)
"""Its expert size is a multiple of 32, as in gpt-oss: see docs/experts.md."""
CHECKPOINTED = replace(PLAIN, micro_batch_size=4, checkpointing=True)
UNDIVIDED = [
    PLAIN,
    CHECKPOINTED,
    replace(CHECKPOINTED, expert_recompute="keep"),
    replace(PLAIN, freeze=("model.layers.*.mlp.experts.down_proj*",), sp=2, stage=2),
]


def in_halves(scenario: Scenario) -> Scenario:
    return replace(scenario, expert_overlap="halves")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results and checkpoints of all scenarios."""
    folder = tmp_path_factory.mktemp("overlap")
    reference_model(PLAIN.expert_size).save_pretrained(str(folder / "model"))
    scenarios = [*UNDIVIDED, *map(in_halves, UNDIVIDED)]
    arguments = [str(folder), *(scenario.dump() for scenario in scenarios)]
    assert launch(ROOT / "tests" / "dist" / "worker.py", 2, arguments) == [0, 0]
    return folder


def steps_of(folder: Path, scenario: Scenario) -> list[dict[str, Any]]:
    steps: list[dict[str, Any]] = json.loads(parameter_file(folder, scenario).read_text())
    return steps


def weights_of(folder: Path, scenario: Scenario) -> dict[str, torch.Tensor]:
    step = step_folder(folder / scenario.name, STEPS)
    manifest = read_manifest(step)
    return read_weights(step, sorted(manifest.tensors), manifest)


@pytest.mark.parametrize("scenario", UNDIVIDED, ids=lambda scenario: scenario.name)
def test_losses_norms_and_bytes_sent_are_those_of_undivided_experts(
    scenario: Scenario, folder: Path
) -> None:
    assert steps_of(folder, in_halves(scenario)) == steps_of(folder, scenario)


@pytest.mark.parametrize("scenario", UNDIVIDED, ids=lambda scenario: scenario.name)
def test_weights_after_training_are_those_of_undivided_experts(
    scenario: Scenario, folder: Path
) -> None:
    found = weights_of(folder, in_halves(scenario))
    for name, expected in weights_of(folder, scenario).items():
        assert torch.equal(found[name], expected), name

"""Traces, and the divergence on them, are those of one process in every layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.dist.cases import Scenario, reference_model
from tests.support.launcher import ROOT, launch

pytestmark = pytest.mark.dist

ONE = Scenario(world_size=1, sp=1, ep=1, stage=3)
OTHERS = [
    Scenario(world_size=2, sp=1, ep=2, stage=2, micro_batch_size=2),
    Scenario(world_size=4, sp=2, ep=2, stage=3),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("traces")
    model = reference_model()
    model.save_pretrained(str(folder / "model"))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter += 2 * parameter.std() * noise
    model.save_pretrained(str(folder / "moved"))
    for world_size in (1, 2, 4):
        scenarios = [one for one in (ONE, *OTHERS) if one.world_size == world_size]
        arguments = [str(folder), *(one.dump() for one in scenarios)]
        worker = ROOT / "tests" / "dist" / "traces_worker.py"
        assert launch(worker, world_size, arguments) == [0] * world_size
    return folder


def found(folder: Path, scenario: Scenario) -> dict[str, list[float]]:
    content: dict[str, list[float]] = json.loads((folder / f"{scenario.name}.json").read_text())
    return content


def traces(folder: Path, scenario: Scenario) -> Any:
    return json.loads((folder / scenario.name / "en.json").read_text())


def test_one_process_finds_nothing_at_its_own_weights_and_something_at_others(
    folder: Path,
) -> None:
    one = found(folder, ONE)
    assert max(one["own"]) <= 1e-6 and min(one["moved"]) > 1e-2


@pytest.mark.parametrize("scenario", OTHERS, ids=lambda scenario: scenario.name)
def test_traces_are_those_of_one_process(folder: Path, scenario: Scenario) -> None:
    expected = traces(folder, ONE)
    got = traces(folder, scenario)
    assert got["replies"] == expected["replies"] and got["prompts"] == expected["prompts"]
    lengths = [len(reply) for reply in expected["replies"]]
    assert max(lengths) == 48


@pytest.mark.parametrize("scenario", OTHERS, ids=lambda scenario: scenario.name)
def test_divergence_is_that_of_one_process(folder: Path, scenario: Scenario) -> None:
    expected = found(folder, ONE)
    got = found(folder, scenario)
    assert max(got["own"]) <= 1e-6
    # fp32 sums are taken in another order
    assert got["moved"] == pytest.approx(expected["moved"], abs=1e-6, rel=1e-5)

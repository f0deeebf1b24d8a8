"""Adapters over a packed base train bit for bit as over the same base decoded, in every layout.

The model's expert matrices are MXFP4 values. Each layout is run twice, with adapter.base bf16 (the
decoded matrices are parameters) and mxfp4 (they stay packed). One run goes on from its first
checkpoint.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from cpt.checkpoint.reader import step_folder
from cpt.model.adapters.layout import is_adapter_name
from cpt.model.weights import mxfp4
from cpt.model.weights.hf_layout import BLOCKS, SCALES, SINGLE_FILE, is_expert_matrix
from tests.dist.cases import STEPS, Scenario, model_config, parameter_file, reference_model
from tests.dist.test_layout_parity import stored_tensors
from tests.support.launcher import ROOT, launch

pytestmark = pytest.mark.dist

EXPERT_SIZE = 96
"""Whole blocks of MXFP4, unlike that of the other scenarios."""
WORKER = ROOT / "tests" / "dist" / "worker.py"
LORA: dict[str, Any] = {"kind": "lora", "rank": 8, "expert_rank": 8, "alpha": 16.0}
DECODED = {**LORA, "base": "bf16"}
PACKED = {**LORA, "base": "mxfp4"}


def scenario(world_size: int, sp: int, ep: int, stage: int, **given: Any) -> Scenario:
    return Scenario(
        world_size=world_size,
        sp=sp,
        ep=ep,
        stage=stage,
        adapter=DECODED,
        weight_decay=0.0,
        expert_size=EXPERT_SIZE,
        saves_first=True,
        **given,
    )


QUICK = [
    scenario(2, 1, 2, 3, checkpointing=True, micro_batch_size=2),
    scenario(2, 2, 1, 2, dtype="bf16"),
]
TABLE = [
    scenario(2, 1, 1, 3, dtype="bf16"),
    scenario(2, 2, 1, 3),
    scenario(2, 1, 2, 1),
    scenario(2, 1, 2, 2, checkpointing=True, dtype="bf16"),
    scenario(2, 1, 2, 3, expert_overlap="halves"),
    scenario(2, 1, 2, 3, offloads={"optimizer": "cpu", "param": "cpu"}),
]


def write_released(folder: Path) -> None:
    """Write a model whose expert matrices are MXFP4 codes."""
    model = reference_model(EXPERT_SIZE)
    stored = {}
    for name, parameter in model.state_dict().items():
        if is_expert_matrix(name, parameter.shape):
            stored[name + BLOCKS], stored[name + SCALES] = mxfp4.encode(parameter)
        else:
            stored[name] = parameter.contiguous()
    folder.mkdir()
    model_config(EXPERT_SIZE).save_pretrained(folder)
    save_file(stored, str(folder / SINGLE_FILE))


def packed(one: Scenario) -> Scenario:
    return replace(one, adapter=PACKED)


def resumed(one: Scenario) -> Scenario:
    return replace(packed(one), resume_from=packed(one).name, start=1, saves_first=False)


def run(folder: Path, scenarios: list[Scenario]) -> None:
    """Run each scenario over both forms of the base, in one launch."""
    write_released(folder / "model")
    arguments = [str(folder)]
    for one in scenarios:
        arguments += [one.dump(), packed(one).dump()]
    arguments.append(resumed(scenarios[0]).dump())
    assert launch(WORKER, 2, arguments, timeout_seconds=1800) == [0, 0]


def assert_bit_equal(folder: Path, one: Scenario, *, goes_on: bool) -> None:
    """Compare losses, gradient norms and the last adapters of the two forms.

    Args:
        folder: Where they ran.
        one: The scenario over the decoded base.
        goes_on: Whether it is the one that was resumed, which sets its later checkpoints aside.
    """
    of_decoded = json.loads(parameter_file(folder, one).read_text())
    of_packed = json.loads(parameter_file(folder, packed(one)).read_text())
    assert of_decoded == of_packed
    last = resumed(one) if goes_on else packed(one)
    decoded = stored_tensors(step_folder(folder / one.name, STEPS), "master")
    held = stored_tensors(step_folder(folder / last.name, STEPS), "master")
    trained = [name for name in decoded if is_adapter_name(name)]
    assert trained
    for name in trained:
        assert torch.equal(decoded[name], held[name]), name


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    run(folder, QUICK)
    return folder


@pytest.mark.parametrize("one", QUICK, ids=lambda one: one.name)
def test_packed_base_trains_as_the_decoded_one_bit_for_bit(one: Scenario, folder: Path) -> None:
    assert_bit_equal(folder, one, goes_on=one == QUICK[0])


def test_packed_base_is_read_again_when_a_run_goes_on(folder: Path) -> None:
    """The checkpoint holds the adapter alone."""
    before = json.loads(parameter_file(folder, packed(QUICK[0])).read_text())
    after = json.loads(parameter_file(folder, resumed(QUICK[0])).read_text())
    assert len(after) == STEPS - 1
    assert after == before[1:]
    stored = stored_tensors(step_folder(folder / packed(QUICK[0]).name, 1), "master")
    assert all(is_adapter_name(name) for name in stored)


@pytest.mark.slow
def test_packed_base_trains_as_the_decoded_one_in_all_layouts(tmp_path: Path) -> None:
    run(tmp_path, TABLE)
    for one in TABLE:
        assert_bit_equal(tmp_path, one, goes_on=one == TABLE[0])

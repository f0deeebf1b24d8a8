"""Training with rounded experts (`train.quantize`) is that of one process with rounded weights.

The oracle is Hugging Face's eager model, whose expert matrices are replaced before each step by
what transformers decodes from the codes of the fp32 master weights; its gradients go to the
masters. Tolerances as in test_layout_parity: fp32 sums in another order.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from cpt.checkpoint.manifest import read_manifest
from cpt.checkpoint.reader import step_folder
from cpt.checkpoint.run_state import quantized_by
from cpt.export.huggingface import export_checkpoint
from cpt.model.weights import mxfp4
from cpt.model.weights.hf_layout import is_expert_matrix
from cpt.training.optimizer import parameter_groups
from tests.dist.cases import (
    CLIPPING,
    SETTINGS,
    Scenario,
    parameter_file,
    reference_model,
    rows_of_two_passes,
)
from tests.dist.test_layout_parity import assert_alike, backward_of_step, named
from tests.support.launcher import ROOT, launch

pytestmark = pytest.mark.dist

EXPERT_SIZE = 96
"""Three blocks, and another number of columns than the hidden size has."""
STEPS = 3


def scenario(world_size: int, sp: int, ep: int, stage: int, **given: Any) -> Scenario:
    return Scenario(
        **{
            "world_size": world_size,
            "sp": sp,
            "ep": ep,
            "stage": stage,
            "expert_size": EXPERT_SIZE,
            "micro_batch_size": rows_of_two_passes(world_size, sp),
            "quantize": {"start_step": 0},
            "steps": STEPS,
            **given,
        }
    )


QUICK = [
    scenario(2, 1, 2, 3, checkpointing=True),
    scenario(2, 2, 1, 3),
    scenario(2, 1, 2, 2),
]


class QuantizedReference:
    """Losses and gradient norms of one process that keeps masters beside rounded weights."""

    def __init__(self, rule: Any = "floor", *, start_step: int = 0, num_steps: int = STEPS) -> None:
        torch.set_num_threads(1)  # the other pytest worker needs the other core
        model = reference_model(EXPERT_SIZE)
        matrices = {n: p for n, p in model.named_parameters() if is_expert_matrix(n, p.shape)}
        assert len(matrices) == 8
        optimizer = torch.optim.AdamW(
            parameter_groups(model, SETTINGS["weight_decay"]),
            lr=SETTINGS["lr"],
            betas=(SETTINGS["beta1"], SETTINGS["beta2"]),
            eps=SETTINGS["eps"],
        )
        self.losses: list[float] = []
        self.norms: list[float] = []
        for step in range(num_steps):
            masters = {name: p.detach().clone() for name, p in matrices.items()}
            if step >= start_step:
                for p in matrices.values():
                    p.data = decoded_by_transformers(p.data, rule)
            loss, _ = backward_of_step(model, step)
            self.losses.append(loss)
            for name, p in matrices.items():
                p.data = masters[name]
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
            self.norms.append(float(norm))
            optimizer.step()


def decoded_by_transformers(values: torch.Tensor, rule: Any) -> torch.Tensor:
    """Return the values that transformers reads from an MXFP4 export of a matrix."""
    blocks, scales = mxfp4.encode(values.bfloat16(), rule)
    return convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16).float()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    reference_model(EXPERT_SIZE).save_pretrained(str(folder / "model"))
    return folder


@pytest.fixture(scope="module")
def reference() -> QuantizedReference:
    return QuantizedReference()


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, list[dict[str, Any]]]:
    arguments = [str(folder), *(chosen.dump() for chosen in QUICK)]
    assert launch(ROOT / "tests" / "dist" / "worker.py", 2, arguments) == [0, 0]
    return {s.name: json.loads(parameter_file(folder, s).read_text()) for s in QUICK}


@named(QUICK)
def test_losses_and_norms_are_those_of_one_process_with_rounded_weights(
    scenario, results, reference
) -> None:
    assert_alike(results[scenario.name], reference.losses, reference.norms)


@named(QUICK)
def test_exported_experts_are_those_of_the_last_forward_pass_bit_for_bit(
    scenario, results, folder, tmp_path
) -> None:
    step = step_folder(folder / scenario.name, scenario.steps)
    assert quantized_by(read_manifest(step)) == "floor"
    exported = load_file(export_checkpoint(step, tmp_path / "out", "mxfp4") / "model.safetensors")
    working = load_file(folder / f"{scenario.name}.working.safetensors")
    assert len(working) == 8
    for name, values in working.items():
        decoded = convert_moe_packed_tensors(
            exported[f"{name}_blocks"], exported[f"{name}_scales"], dtype=torch.bfloat16
        )
        assert torch.equal(decoded.to(values.dtype), values), name

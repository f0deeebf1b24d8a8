"""Training with rounded experts (`train.quantize`) is that of one process with rounded weights.

The oracle is Hugging Face's eager model, whose expert matrices are replaced before each step by
what transformers decodes from the codes of the fp32 master weights; its gradients go to the
masters. Tolerances as in test_layout_parity: fp32 sums in another order.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import GptOssForCausalLM
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from cpt.checkpoint.manifest import read_manifest
from cpt.checkpoint.reader import step_folder
from cpt.checkpoint.run_state import quantized_by
from cpt.config.precision_sections import ExponentRule
from cpt.export import huggingface
from cpt.export.huggingface import export_checkpoint
from cpt.model.freezing import freeze
from cpt.model.weights import mxfp4
from cpt.model.weights.hf_layout import is_expert_matrix
from cpt.training.optimizer import parameter_groups
from tests.dist.cases import (
    CLIPPING,
    NUM_LAYERS,
    POISONED,
    SETTINGS,
    Scenario,
    reference_model,
    rows_of_two_passes,
)
from tests.dist.test_layout_parity import (
    LAYOUTS,
    assert_alike,
    backward_of_step,
    key_of,
    named,
    run_all,
    run_together,
    stored,
)

pytestmark = pytest.mark.dist

EXPERT_SIZE = 96
"""Three blocks: another number of columns than the hidden size has."""
STEPS = 3
UNUSED_EXPERT = ("model.layers.1.mlp.experts.gate_up_proj", 5)
"""No token reaches it, so nothing but weight decay moves its weights."""


def scenario(world_size: int, sp: int, ep: int, stage: int, **given: Any) -> Scenario:
    usual = {
        "expert_size": EXPERT_SIZE,
        "micro_batch_size": rows_of_two_passes(world_size, sp),
        "quantize": {"start_step": 0},
        "steps": STEPS,
    }
    return Scenario(world_size=world_size, sp=sp, ep=ep, stage=stage, **{**usual, **given})


FIRST = scenario(2, 1, 2, 3, checkpointing=True, saves_first=True)
LATE = scenario(2, 1, 2, 2, quantize={"start_step": 1, "exponent": "least"}, steps=2)
RESUMED = replace(FIRST, sp=2, ep=1, stage=1, start=1, resume_from=FIRST.name, checkpointing=False)
"""`FIRST` from its first step on, in another layout."""
BF16 = scenario(2, 2, 1, 3, dtype="bf16", quantize={"start_step": 0, "exponent": "ceil"}, steps=1)
QUICK = [FIRST, LATE, RESUMED, BF16]
INFINITE = scenario(2, 1, 1, 3, poison="inf", steps=1)
POISONED_TABLE = [
    scenario(2, 1, 1, 3, poison="nan", steps=1),
    scenario(2, 1, 2, 2, poison="inf", steps=1, dtype="bf16"),
    scenario(2, 1, 2, 2, poison="nan", steps=1),
]
FROZEN = ("model.layers.0.mlp.experts", "attention")
FROZEN_TABLE = [
    scenario(2, 1, 1, 3, freeze=FROZEN, steps=2),
    scenario(2, 1, 2, 2, freeze=FROZEN, steps=2),
]
TABLE = [
    *(scenario(*layout) for layout in LAYOUTS),
    scenario(1, 1, 1, 2, quantize={"start_step": 1, "exponent": "ceil"}),
    scenario(4, 2, 2, 3, quantize={"start_step": 1, "exponent": "least"}, checkpointing=True),
    scenario(4, 1, 2, 3, expert_overlap="halves"),
    scenario(2, 1, 2, 3, micro_batch_size=1),
    scenario(2, 1, 1, 3, persistence_threshold=10**6),
    scenario(2, 1, 2, 3, persistence_threshold=10**6),
    scenario(2, 1, 1, 3, sub_group_size=20_000),
    scenario(2, 1, 2, 3, offloads={"optimizer": "cpu"}),
    scenario(2, 1, 1, 3, offloads={"optimizer": "cpu", "param": "cpu"}),
    scenario(2, 1, 2, 3, offloads={"optimizer": "nvme", "param": "nvme"}),
    scenario(2, 1, 2, 3, offloads={"param": "nvme"}),
    scenario(2, 1, 2, 2, offloads={"optimizer": "cpu"}),
]
RESUMED_TABLE = [
    replace(scenario(4, 1, 2, 3), start=1, resume_from=FIRST.name),
    replace(scenario(1, 1, 1, 2), start=1, resume_from=FIRST.name),
    replace(
        scenario(2, 1, 1, 3, offloads={"optimizer": "nvme", "param": "nvme"}),
        start=1,
        resume_from=FIRST.name,
    ),
]
BF16_TABLE = []
for one in (
    scenario(1, 1, 1, 3),
    scenario(2, 2, 1, 3),
    scenario(4, 2, 2, 3, checkpointing=True),
    scenario(2, 1, 2, 1),
    scenario(2, 1, 2, 3, offloads={"optimizer": "cpu", "param": "cpu"}),
    scenario(2, 1, 2, 3, offloads={"optimizer": "nvme", "param": "nvme"}),
    scenario(2, 1, 1, 3, persistence_threshold=10**6),
):
    for rule in mxfp4.EXPONENT_RULES:
        quantize = {"start_step": 0, "exponent": rule}
        BF16_TABLE.append(replace(one, dtype="bf16", quantize=quantize, steps=2))


def first_model() -> GptOssForCausalLM:
    """Return the model that all begin with; an unused expert has odd blocks."""
    model = reference_model(EXPERT_SIZE)
    name, expert = UNUSED_EXPERT
    with torch.no_grad():
        matrix = dict(model.named_parameters())[name]
        matrix[expert, :32, 0] = 0.0
        matrix[expert, :32, 1] = 5e-39  # denormal, in fp32 and in bf16
        matrix[expert, :32, 2] = torch.linspace(-1e-38, 1e38, 32)
    return model


class QuantizedReference:
    """Losses and gradient norms of one process that keeps masters beside rounded weights."""

    def __init__(self, chosen: Scenario) -> None:
        torch.set_num_threads(1)  # the other pytest worker needs the other core
        model = first_model()
        freeze(model, chosen.freeze)
        matrices = {}
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and is_expert_matrix(name, tuple(parameter.shape)):
                matrices[name] = parameter
        optimizer = torch.optim.AdamW(
            parameter_groups(model, SETTINGS["weight_decay"]),
            lr=SETTINGS["lr"],
            betas=(SETTINGS["beta1"], SETTINGS["beta2"]),
            eps=SETTINGS["eps"],
        )
        self.losses: list[float] = []
        self.norms: list[float] = []
        for step in range(chosen.steps):
            masters = {name: p.detach().clone() for name, p in matrices.items()}
            if step >= chosen.quantize["start_step"]:
                for parameter in matrices.values():
                    parameter.data = decoded_by_transformers(parameter.data, rule_of(chosen))
            loss, _ = backward_of_step(model, step)
            self.losses.append(loss)
            for name, parameter in matrices.items():
                parameter.data = masters[name]
            norm = torch.nn.utils.clip_grad_norm_(model.parameters(), CLIPPING)
            self.norms.append(float(norm))
            optimizer.step()


def rule_of(chosen: Scenario) -> ExponentRule:
    rule: ExponentRule = chosen.quantize.get("exponent", "floor")
    return rule


def decoded_by_transformers(values: torch.Tensor, rule: ExponentRule) -> torch.Tensor:
    """Return the values that transformers reads from an MXFP4 export of a matrix."""
    blocks, scales = mxfp4.encode(values.bfloat16(), rule)
    decoded: torch.Tensor = convert_moe_packed_tensors(blocks, scales, dtype=torch.bfloat16)
    return decoded.float()


class References:
    """The oracle of each way to round and freeze, run once."""

    def __init__(self) -> None:
        self._by_section: dict[str, QuantizedReference] = {}

    def of(self, chosen: Scenario) -> QuantizedReference:
        key = json.dumps([chosen.quantize, chosen.freeze, chosen.steps])
        if key not in self._by_section:
            self._by_section[key] = QuantizedReference(chosen)
        return self._by_section[key]


@pytest.fixture(autouse=True)
def no_tokenizer(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tokenizer takes longer to write than the weights, and is not looked at here."""
    monkeypatch.setattr(huggingface, "save_tokenizer", lambda *arguments: None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    first_model().save_pretrained(str(folder / "model"))
    return folder


@pytest.fixture(scope="module")
def references() -> References:
    return References()


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, list[dict[str, Any]]]:
    return run_together(folder, [*QUICK, INFINITE], 2, timeout_seconds=300)


@pytest.fixture(scope="module")
def table(results: Any, folder: Path) -> dict[str, list[dict[str, Any]]]:
    return run_all(folder, [*TABLE, *RESUMED_TABLE, *BF16_TABLE, *POISONED_TABLE, *FROZEN_TABLE])


def assert_equal_to_oracle(
    chosen: Scenario, steps: list[dict[str, Any]], references: References
) -> None:
    oracle = references.of(chosen)
    span = slice(chosen.start, chosen.steps)
    is_bf16 = chosen.dtype == "bf16"
    assert_alike(steps, oracle.losses[span], oracle.norms[span], bf16=is_bf16)


def assert_export_is_what_was_trained(chosen: Scenario, folder: Path, out: Path) -> None:
    """Assert that transformers reads the weights of the next forward pass from an export."""
    step = step_folder(folder / chosen.name, chosen.steps)
    rule = quantized_by(read_manifest(step))
    assert rule == rule_of(chosen)
    exported = load_file(export_checkpoint(step, out, "mxfp4") / "model.safetensors")
    working = working_weights(chosen, folder)
    assert len(working) == 2 * NUM_LAYERS
    for name, values in working.items():
        decoded = convert_moe_packed_tensors(
            exported[f"{name}_blocks"], exported[f"{name}_scales"], dtype=torch.bfloat16
        )
        assert torch.equal(decoded.to(values.dtype), values), name


def assert_working_weights_are_decoded_masters(chosen: Scenario, folder: Path) -> None:
    """Assert that the next forward pass sees what transformers decodes, and masters are others."""
    masters = stored(folder, chosen, "master")
    working = working_weights(chosen, folder)
    assert len(working) == 2 * NUM_LAYERS
    for name, values in working.items():
        decoded = decoded_by_transformers(masters[name], rule_of(chosen))
        assert torch.equal(decoded, values.float()), name
        assert not torch.equal(masters[name], values.float()), f"{name}: the master was rounded"


def working_weights(chosen: Scenario, folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / f"{chosen.name}.working.safetensors")


@named(QUICK)
def test_losses_and_norms_are_those_of_one_process_with_rounded_weights(
    scenario, results, references
) -> None:
    assert_equal_to_oracle(scenario, results[key_of(scenario)], references)


@named(QUICK)
def test_next_forward_pass_sees_the_decoded_masters_bit_for_bit(scenario, results, folder) -> None:
    assert_working_weights_are_decoded_masters(scenario, folder)


def test_exported_experts_are_those_of_the_next_forward_pass(results, folder, tmp_path) -> None:
    assert_export_is_what_was_trained(FIRST, folder, tmp_path / "out")


def test_blocks_of_zeros_and_denormal_values_are_trained_as_they_are_exported(
    results, folder
) -> None:
    name, expert = UNUSED_EXPERT
    working = working_weights(FIRST, folder)[name][expert, :32]
    assert working[:, 0].count_nonzero() == 0
    assert (working[:, 1] == 2.0**-127).all()
    assert working[:, 2].isfinite().all() and working[-1, 2] > 5e37


def test_an_infinite_master_is_never_made_finite(results, folder) -> None:
    assert_poisoned_and_skipped(INFINITE, results, folder)


def assert_poisoned_and_skipped(
    chosen: Scenario, steps: dict[str, list[dict[str, Any]]], folder: Path
) -> None:
    """Assert that the block of the poisoned weight is not finite, and that nothing was updated."""
    (step,) = steps[key_of(chosen)]
    assert not step["applied"]
    working = working_weights(chosen, folder)[POISONED]
    assert not working[0, :32, 0].isfinite().any()
    assert working.isfinite().sum() == working.numel() - 32


@pytest.mark.slow
@named(POISONED_TABLE)
def test_a_master_that_is_not_finite_is_never_made_finite(scenario, table, folder) -> None:
    assert_poisoned_and_skipped(scenario, table, folder)


@pytest.mark.slow
@named(FROZEN_TABLE)
def test_frozen_experts_stay_as_they_are_and_the_others_are_rounded(
    scenario, table, references, folder
) -> None:
    assert_equal_to_oracle(scenario, table[key_of(scenario)], references)
    before = dict(first_model().named_parameters())
    masters = stored(folder, scenario, "master")
    for name, values in working_weights(scenario, folder).items():
        if ".layers.0." in name:
            assert torch.equal(values, before[name])
        else:
            assert torch.equal(values, decoded_by_transformers(masters[name], "floor"))


@pytest.mark.slow
@named([*TABLE, *RESUMED_TABLE, *BF16_TABLE])
def test_every_layout_trains_and_exports_the_rounded_model(
    scenario, table, references, folder, tmp_path
) -> None:
    assert_equal_to_oracle(scenario, table[key_of(scenario)], references)
    assert_working_weights_are_decoded_masters(scenario, folder)
    assert_export_is_what_was_trained(scenario, folder, tmp_path / "out")

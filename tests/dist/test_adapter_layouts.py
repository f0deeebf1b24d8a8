"""Adapters train in every layout as PEFT trains them on Hugging Face's eager code.

The oracle is peft (target_modules and target_parameters) on transformers' eager gpt-oss with
explicit masks for packed documents and torch's AdamW. Tolerances as in test_layout_parity: 2e-5 in
loss and 1e-4 in the norm and in every gradient. `make test` has one launch of two ranks; the table
of layouts is slow.
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import peft
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrize import register_parametrization

from cpt.checkpoint.manifest import read_manifest
from cpt.checkpoint.model_weights import open_weights
from cpt.checkpoint.reader import step_folder
from cpt.config.adapter_section import AdapterSection
from cpt.export.adapter import export_adapter
from cpt.model.adapters.layout import ATTENTION, EXPERTS, adapter_shapes
from cpt.model.parameters import parameter_numels
from cpt.model.weights.hf_layout import is_expert_name
from cpt.model.weights.source import fill_parts
from tests.dist.cases import (
    CLIPPING,
    SETTINGS,
    STEPS,
    Scenario,
    adapter_value,
    model_config,
    num_predicted,
    reference_model,
    rows_of_step,
    rows_of_two_passes,
)
from tests.dist.test_layout_parity import (
    assert_alike,
    backward_of_step,
    eager_logits,
    key_of,
    run_all,
    run_together,
    stored_tensors,
)

pytestmark = pytest.mark.dist

RANK = 8
LORA: dict[str, Any] = {"kind": "lora", "rank": RANK, "expert_rank": RANK, "alpha": 16.0}
DORA: dict[str, Any] = {"kind": "dora", "rank": RANK, "alpha": 16.0, "targets": ["attention"]}
SHARED: dict[str, Any] = {**LORA, "share_experts": True}
SCALE = 2.0


def scenario(world_size: int, sp: int, ep: int, stage: int, **given: Any) -> Scenario:
    adapter = given.pop("adapter", LORA)
    return Scenario(
        world_size=world_size,
        sp=sp,
        ep=ep,
        stage=stage,
        adapter=adapter,
        saves_first=True,
        weight_decay=0.0,
        **given,
    )


QUICK = [
    scenario(2, 1, 2, 3, checkpointing=True, micro_batch_size=2),
    scenario(2, 2, 1, 2, micro_batch_size=2),
    scenario(2, 2, 2, 3, adapter=DORA, checkpointing=True, micro_batch_size=4),
    scenario(2, 1, 2, 3, adapter=SHARED, micro_batch_size=2),
]


def resumed(first: Scenario, sp: int, ep: int, stage: int) -> Scenario:
    """Return the scenario that goes on after the first step in another layout, in two passes."""
    return replace(
        first,
        sp=sp,
        ep=ep,
        stage=stage,
        start=1,
        resume_from=first.name,
        micro_batch_size=rows_of_two_passes(first.world_size, sp),
    )


RESUMED = [
    resumed(QUICK[0], sp=2, ep=1, stage=2),
    resumed(QUICK[2], sp=1, ep=1, stage=1),
    resumed(QUICK[3], sp=2, ep=2, stage=2),
]
"""Scenarios of `QUICK` from their first step on, in other layouts."""
BF16 = scenario(2, 1, 2, 2, dtype="bf16", micro_batch_size=2, steps=1)
TABLE = [
    scenario(1, 1, 1, 3),
    scenario(2, 2, 1, 3),
    scenario(2, 1, 2, 3),
    scenario(4, 2, 2, 3),
    scenario(1, 1, 1, 2),
    scenario(2, 1, 2, 2),
    scenario(2, 1, 2, 1),
    scenario(4, 2, 2, 2),
    scenario(4, 1, 4, 2, checkpointing=True, expert_recompute="keep"),
    scenario(4, 2, 2, 3, checkpointing=True, micro_batch_size=2),
    scenario(4, 1, 2, 3, expert_overlap="halves"),
    scenario(2, 1, 2, 3, offloads={"optimizer": "cpu"}),
    scenario(2, 1, 2, 3, offloads={"optimizer": "cpu", "param": "cpu"}),
    scenario(1, 1, 1, 3, adapter=DORA),
    scenario(4, 2, 2, 3, adapter=DORA),
    scenario(1, 1, 1, 3, adapter=SHARED),
    scenario(4, 2, 2, 2, adapter=SHARED),
    scenario(2, 1, 1, 3, adapter={**LORA, "layers": ["1-2"]}),
]


class Trained(NamedTuple):
    """A parameter of an oracle, and how its layout is turned into ours and back."""

    parameter: nn.Parameter
    to_ours: Callable[[torch.Tensor], torch.Tensor]
    from_ours: Callable[[torch.Tensor], torch.Tensor]


def as_it_is(value: torch.Tensor) -> torch.Tensor:
    return value


def peft_model(section: AdapterSection) -> tuple[nn.Module, dict[str, Trained]]:
    """Return PEFT's model, and what it trains by our names."""
    model = reference_model()
    model.config._experts_implementation = "eager"
    experts = [f"mlp.experts.{name}" for name in EXPERTS]
    if section.layers:  # PEFT's layers_to_transform does not reach target_parameters
        experts = [f"layers.{layer}.{name}" for layer in (1, 2) for name in experts]
    config = peft.LoraConfig(
        r=section.rank,
        lora_alpha=section.alpha,
        use_dora=section.kind == "dora",
        target_modules=list(ATTENTION),
        target_parameters=experts if "experts" in section.targets else None,
        layers_to_transform=[1, 2] if section.layers else None,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    trained = {}
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            ours, *functions = _ours(name, model_config().num_local_experts)
            trained[ours] = Trained(parameter, *functions)
    return wrapped, trained


def _ours(name: str, experts: int) -> tuple[str, Any, Any]:
    """Return our name of a tensor of PEFT, and the functions of `Trained`.

    PEFT stacks an expert's A behind those of other experts, and has the expert as the fastest index
    of the columns of B. The matrix is told by the nesting of its wrapper alone.
    """
    name = name.removeprefix("base_model.model.").removesuffix(".weight").removesuffix(".default")
    module, _, kind = name.rpartition(".")
    if ".experts" not in module:
        return f"{module}.{kind.replace('magnitude_vector', 'magnitude')}", as_it_is, as_it_is
    matrix = "gate_up_proj" if module.endswith(".base_layer") else "down_proj"
    ours = f"{module.removesuffix('.base_layer')}.{matrix}_{kind}"
    if kind == "lora_A":
        return (
            ours,
            lambda w: w.view(experts, -1, w.shape[1]).transpose(1, 2),
            lambda w: w.transpose(1, 2).reshape(-1, w.shape[1]),
        )
    return (
        ours,
        lambda w: w.view(w.shape[0], -1, experts).permute(2, 1, 0),
        lambda w: w.permute(2, 1, 0).reshape(w.shape[2], -1),
    )


class AddShared(nn.Module):
    """W + s A B of every expert, with one A and B."""

    def __init__(self, weight: torch.Tensor, rank: int) -> None:
        super().__init__()
        self.lora_A = nn.Parameter(torch.empty(weight.shape[1], rank))
        self.lora_B = nn.Parameter(torch.empty(rank, weight.shape[2]))

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight + SCALE * (self.lora_A @ self.lora_B)


def model_with_shared(section: AdapterSection) -> tuple[nn.Module, dict[str, Trained]]:
    """Return PEFT's model with adapters of attention, and shared ones beside its experts."""
    wrapped, trained = peft_model(replace(section, share_experts=False, targets=("attention",)))
    for index, layer in enumerate(wrapped.base_model.model.model.layers):
        experts = layer.mlp.experts
        for matrix in EXPERTS:
            added = AddShared(getattr(experts, matrix), RANK)
            register_parametrization(experts, matrix, added)
            for kind, parameter in added.named_parameters():
                name = f"model.layers.{index}.mlp.experts.{matrix}_shared_{kind}"
                trained[name] = Trained(parameter, as_it_is, as_it_is)
    return wrapped, trained


class PeftReference:
    """Losses, norms, gradients and final values of one process with PEFT, by our names."""

    def __init__(self, section: AdapterSection) -> None:
        torch.set_num_threads(1)  # the other pytest worker needs the other core
        build = model_with_shared if section.share_experts else peft_model
        model, trained = build(section)
        shapes = adapter_shapes(section, model_config())
        assert trained.keys() == shapes.keys()
        with torch.no_grad():
            for name, one in trained.items():
                if not name.endswith("magnitude"):
                    one.parameter.copy_(one.from_ours(adapter_value(name, shapes[name])))
        self.first = {
            name: one.to_ours(one.parameter.detach().clone()) for name, one in trained.items()
        }
        parameters = [one.parameter for one in trained.values()]
        optimizer = torch.optim.AdamW(
            parameters,
            lr=SETTINGS["lr"],
            betas=(SETTINGS["beta1"], SETTINGS["beta2"]),
            eps=SETTINGS["eps"],
            weight_decay=0.0,
        )
        self.losses: list[float] = []
        self.norms: list[float] = []
        for step in range(STEPS):
            loss, _ = backward_of_step(model, step)
            self.losses.append(loss)
            self.norms.append(float(torch.nn.utils.clip_grad_norm_(parameters, CLIPPING)))
            if step == 0:
                self.gradients = {}
                for name, one in trained.items():
                    assert one.parameter.grad is not None
                    self.gradients[name] = one.to_ours(one.parameter.grad.clone())
            optimizer.step()
        self.last = {name: one.to_ours(one.parameter.detach()) for name, one in trained.items()}


def section_of(chosen: Scenario) -> AdapterSection:
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in chosen.adapter.items()}
    return AdapterSection(**given)


class References:
    """The oracle of each section, run once."""

    def __init__(self, folder: Path) -> None:
        reference_model().save_pretrained(str(folder / "model"))
        self._by_section: dict[str, PeftReference] = {}

    def of(self, chosen: Scenario) -> PeftReference:
        key = json.dumps(chosen.adapter)
        if key not in self._by_section:
            self._by_section[key] = PeftReference(section_of(chosen))
        return self._by_section[key]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("adapters")


@pytest.fixture(scope="module")
def references(folder: Path) -> References:
    return References(folder)


@pytest.fixture(scope="module")
def results(folder: Path, references: References) -> dict[str, list[dict[str, Any]]]:
    return run_together(folder, [*QUICK, *RESUMED, BF16], 2, timeout_seconds=1800)


@pytest.fixture(scope="module")
def table(folder: Path, references: References) -> dict[str, list[dict[str, Any]]]:
    return run_all(folder, TABLE)


def assert_equal_to_peft(
    chosen: Scenario, steps: list[dict[str, Any]], references: References, folder: Path
) -> None:
    """Assert that losses, norms, first gradients and last values are those of the oracle."""
    oracle = references.of(chosen)
    assert_alike(steps, oracle.losses, oracle.norms)
    moments = stored_tensors(step_folder(folder / chosen.name, 1), "exp_avg")
    values = stored_tensors(step_folder(folder / chosen.name, STEPS), "master")
    clip = min(1.0, CLIPPING / oracle.norms[0])
    for name, gradient in oracle.gradients.items():
        expected = gradient * clip * (1 - SETTINGS["beta1"])
        found = moments[name]
        error = float((found - expected).norm() / expected.norm().clamp(min=1e-9))
        assert error <= 1e-4, f"gradient of {name}: relative error {error}"
        moved = (oracle.last[name] - oracle.first[name]).norm()
        error = float((values[name] - oracle.last[name]).norm() / moved)
        assert error <= 1e-3, f"{name} after training: error {error} of its movement"


def named(scenarios: list[Scenario]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("chosen", scenarios, ids=lambda s: s.name)


@named(QUICK)
def test_losses_norms_and_every_gradient_are_those_of_peft(
    chosen, results, references, folder
) -> None:
    assert_equal_to_peft(chosen, results[key_of(chosen)], references, folder)


@named(RESUMED)
def test_a_run_goes_on_in_another_layout_from_the_adapter_alone(
    chosen, results, references, folder
) -> None:
    oracle = references.of(chosen)
    assert_alike(results[key_of(chosen)], oracle.losses[1:], oracle.norms[1:])
    last = stored_tensors(step_folder(folder / chosen.name, STEPS), "master")
    assert last.keys() == adapter_shapes(section_of(chosen), model_config()).keys()
    for name, expected in oracle.last.items():
        moved = (expected - oracle.first[name]).norm()
        error = float((last[name] - expected).norm() / moved)
        assert error <= 1e-3, f"{name} after training: error {error} of its movement"


@named([QUICK[0], QUICK[2], QUICK[3]])
def test_merged_model_and_peft_have_the_loss_of_the_next_step(
    chosen, results, folder, tmp_path: Path
) -> None:
    step = step_folder(folder / chosen.name, 1)
    merged = reference_model()
    source = open_weights(step, read_manifest(step), torch.float32)
    parameters = dict(merged.named_parameters())
    fill_parts({name: (p.detach().view(-1), 0) for name, p in parameters.items()}, source)
    exported = export_adapter(step, tmp_path / "peft", "fp32")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(
            reference_model(), str(exported), autocast_adapter_dtype=False
        )
    expected = results[key_of(chosen)][1]["loss"]
    for model in (merged, loaded):
        assert abs(loss_of_step(model, 1) - expected) <= 2e-5


def loss_of_step(model: nn.Module, step: int) -> float:
    """Return the loss of a model on the rows of a step, without gradients."""
    nats = 0.0
    rows = rows_of_step(step)
    with torch.no_grad():
        for row in rows:
            labels = torch.from_numpy(row.labels)
            logits = eager_logits(model, row)
            nats += F.cross_entropy(logits, labels, reduction="sum", ignore_index=-100).item()
    return nats / num_predicted(rows)


def report_of(chosen: Scenario, folder: Path) -> list[dict[str, Any]]:
    """Return what every rank of a scenario held."""
    found: list[dict[str, Any]] = json.loads((folder / f"{chosen.name}.adapter.json").read_text())
    return found


def assert_base_is_unchanged(chosen: Scenario, folder: Path) -> None:
    """Assert that training left every bit below the adapters, and one value of each replica."""
    ranks = report_of(chosen, folder)
    for rank in ranks:
        assert rank["base_after"] == rank["base_before"]
        assert rank["gradients_of_frozen"] == []
    assert len({rank["replicated"] for rank in ranks}) == 1


@named([*QUICK, BF16])
def test_base_is_unchanged_and_replicas_are_equal(chosen, results, folder) -> None:
    assert_base_is_unchanged(chosen, folder)


PADDING_BYTES = 4096
"""DeepSpeed fills up the partitions of a group of parameters to equal sizes."""


@named([*QUICK, BF16])
def test_optimizer_state_is_that_of_adapters_and_frozen_weights_have_one_copy(
    chosen, results, folder
) -> None:
    """Bytes of all ranks: 12 for a trained value, and those of the working dtype for the rest."""
    ranks = report_of(chosen, folder)
    shapes = adapter_shapes(section_of(chosen), model_config())
    trained = sum(math.prod(shape) for shape in shapes.values())
    optimizer = sum(rank["optimizer_bytes"] for rank in ranks)
    assert 0 <= optimizer - 12 * trained <= PADDING_BYTES * chosen.world_size
    dense = experts = 0
    for name, numel in parameter_numels(model_config()).items():
        if is_expert_name(name):
            experts += numel
        else:
            dense += numel
    copies_of_dense = 1 if chosen.stage == 3 else chosen.world_size
    copies_of_experts = 1 if chosen.stage == 3 else chosen.world_size // chosen.ep
    itemsize = 2 if chosen.dtype == "bf16" else 4
    expected = itemsize * (dense * copies_of_dense + experts * copies_of_experts)
    frozen = sum(rank["frozen_bytes"] for rank in ranks)
    assert 0 <= frozen - expected <= PADDING_BYTES * chosen.world_size


def test_an_expert_without_tokens_keeps_its_adapter(results, references, folder) -> None:
    """Expert 5 of layer 1 is never chosen; without decay nothing moves its adapter."""
    chosen = QUICK[0]
    values = stored_tensors(step_folder(folder / chosen.name, STEPS), "master")
    first = references.of(chosen).first
    for matrix in EXPERTS:
        for part in ("lora_A", "lora_B"):
            name = f"model.layers.1.mlp.experts.{matrix}_{part}"
            assert torch.equal(values[name][5], first[name][5])
            has_moved = (values[name] != first[name]).flatten(1).any(1)
            assert has_moved.any(), "no expert has moved"


@pytest.mark.slow
@named(TABLE)
def test_every_layout_gives_the_numbers_of_peft(chosen, table, references, folder) -> None:
    assert_equal_to_peft(chosen, table[key_of(chosen)], references, folder)
    assert_base_is_unchanged(chosen, folder)

"""Experts in halves give the bits of undivided ones and overlap exchange with computation.

The ranks are threads of this process; tests/dist has processes.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

from cpt.model import recomputation
from cpt.model.experts import overlap
from cpt.model.experts.dispatch import label_by_half
from cpt.model.experts.layer import EXPERT_TENSORS, ExpertParallelMLP
from cpt.model.products.recipe import EightBit
from tests.support.expert_adapters import add_adapters, fill_adapters
from tests.support.threaded_ranks import ThreadedRanks

MODEL_SIZE = 32
EXPERT_SIZE = 64
"""A multiple of 32, as in gpt-oss: torch computes the last values of a block that fill no vector
register with another exp, and so the bits of a CPU would depend on where a block ends."""
TOKENS = 300
"""Enough for several blocks of the elementwise passes."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One way to run the layer."""

    ranks: int = 2
    experts: int = 8
    dtype: torch.dtype = torch.float32
    idle: tuple[int, ...] = ()
    """Experts that no token chooses."""
    frozen: tuple[str, ...] = ()
    """Expert tensors that are not trained."""
    input_needs_gradient: bool = True
    recompute: str = ""
    """recompute or keep, with activation checkpointing; empty without it."""
    adapters: str = ""
    """own or shared, for those of each expert or of all; empty without adapters."""


CASES = {
    "two ranks": Case(),
    "four ranks": Case(ranks=4),
    "bf16": Case(dtype=torch.bfloat16),
    "loop instead of grouped products": Case(dtype=torch.float64),
    "uneven halves": Case(experts=6),
    "experts without rows": Case(idle=(1, 6)),
    "first halves without rows": Case(idle=(0, 1, 4, 5)),
    "second half of a rank without rows": Case(idle=(6, 7)),
    "rank without rows": Case(idle=(4, 5, 6, 7)),
    "frozen experts": Case(frozen=tuple(EXPERT_TENSORS)),
    "frozen matrices": Case(frozen=("gate_up_proj", "down_proj")),
    "frozen biases": Case(frozen=("gate_up_proj_bias", "down_proj_bias")),
    "input without gradient": Case(input_needs_gradient=False),
    "recomputed": Case(recompute="recompute"),
    "recomputed with rows kept": Case(recompute="keep"),
    "recomputed with rows kept, frozen": Case(recompute="keep", frozen=tuple(EXPERT_TENSORS)),
    "adapters": Case(adapters="own", frozen=tuple(EXPERT_TENSORS)),
    "adapters in bf16": Case(adapters="own", dtype=torch.bfloat16),
    "adapters of experts without rows": Case(adapters="own", idle=(0, 1, 4, 5)),
    "adapters, recomputed": Case(adapters="own", recompute="recompute"),
    "adapters, recomputed with rows kept": Case(adapters="own", recompute="keep"),
    "adapters, input without gradient": Case(adapters="own", input_needs_gradient=False),
    "shared adapters": Case(adapters="shared", frozen=tuple(EXPERT_TENSORS)),
}


def draw_layer(case: Case) -> GptOssMLP:
    """Return a layer with random biases; zeros would hide half of the errors."""
    config = GptOssConfig(
        hidden_size=MODEL_SIZE,
        intermediate_size=EXPERT_SIZE,
        num_local_experts=case.experts,
        num_experts_per_tok=3,
    )
    layer = GptOssMLP(config)
    generator = torch.Generator().manual_seed(5)
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    layer.router.bias.data[list(case.idle)] = -1e6
    if not case.input_needs_gradient:
        layer.router.requires_grad_(False)
    return layer.to(case.dtype)


def run_rank(
    ranks: ThreadedRanks, rank: int, case: Case, *, in_halves: bool
) -> dict[str, torch.Tensor | None]:
    """Return outputs and gradients of one rank."""
    topology: Any = SimpleNamespace(
        ep_size=case.ranks, ep_rank=rank, ep_group=ranks, traffic=ranks.traffic[rank]
    )
    mlp = ExpertParallelMLP(draw_layer(case), topology, in_halves=in_halves).train()
    for name in case.frozen:
        getattr(mlp.experts, name).requires_grad_(False)
    if case.adapters:
        fill_adapters(
            add_adapters(mlp.experts, shared=case.adapters == "shared"), mlp.experts.first_expert
        )
    watched: list[int] = []
    mlp.watch = SimpleNamespace(  # type: ignore[assignment]
        observe=lambda index, hidden, logits, weights, choice: weights, computed=watched.append
    )
    generator = torch.Generator().manual_seed(100 + rank)
    hidden = torch.randn(1, TOKENS, MODEL_SIZE, generator=generator).to(case.dtype)
    hidden.requires_grad_(case.input_needs_gradient)
    if case.recompute:
        context_fn = recomputation.context_fn(keep=case.recompute == "keep")
        out = checkpoint(lambda x: mlp(x)[0], hidden, use_reentrant=False, context_fn=context_fn)
    else:
        out = mlp(hidden)[0]
    slope = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).to(case.dtype)
    ranks.note("backward")
    (out * slope.view_as(out)).sum().backward()
    found = {name: parameter.grad for name, parameter in mlp.named_parameters()}
    computed = torch.tensor(watched)
    return {"output": out.detach(), "hidden": hidden.grad, "computed": computed, **found}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_halves_give_outputs_gradients_and_traffic_of_the_undivided_layer(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    undivided = ThreadedRanks(case.ranks, monkeypatch)
    expected = undivided.run(lambda rank: run_rank(undivided, rank, case, in_halves=False))
    halves = ThreadedRanks(case.ranks, monkeypatch)
    found = halves.run(lambda rank: run_rank(halves, rank, case, in_halves=True))
    for rank in range(case.ranks):
        for name, tensor in expected[rank].items():
            other = found[rank][name]
            if tensor is None:
                assert other is None, (rank, name)
                continue
            assert other is not None and other.dtype == tensor.dtype, (rank, name)
            difference = (other.double() - tensor.double()).abs()
            assert torch.equal(other, tensor), (rank, name, difference.max(), difference.mean())
        sent = undivided.traffic[rank].take()
        assert sent["experts"] > 0 and halves.traffic[rank].take() == sent


def test_no_expert_is_idle_and_gradients_are_not_zero(monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise the comparison above would see little."""
    ranks = ThreadedRanks(2, monkeypatch)
    for found in ranks.run(lambda rank: run_rank(ranks, rank, Case(), in_halves=True)):
        for name in EXPERT_TENSORS:
            gradient = found[f"experts.{name}"]
            assert gradient is not None and (gradient.flatten(1) != 0).any(1).all()


def test_experts_in_halves_compute_in_the_working_precision_when_they_are_evaluated(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ranks = ThreadedRanks(2, monkeypatch)

    @torch.no_grad()
    def outputs(rank: int) -> list[torch.Tensor]:
        topology: Any = SimpleNamespace(
            ep_size=2, ep_rank=rank, ep_group=ranks, traffic=ranks.traffic[rank]
        )
        mlp = ExpertParallelMLP(draw_layer(Case()), topology, in_halves=True)
        hidden = torch.randn(1, 40, MODEL_SIZE, generator=torch.Generator().manual_seed(rank))
        plain = mlp.eval()(hidden)[0]
        mlp.experts.eight_bit = EightBit("rows")
        return [plain, mlp(hidden)[0], mlp.train()(hidden)[0]]

    for plain, evaluated, trained in ranks.run(outputs):
        assert torch.equal(evaluated, plain)
        assert not torch.equal(trained, plain), "the products were not rounded in training"


def events_of_a_step(monkeypatch: pytest.MonkeyPatch, case: Case) -> list[str]:
    """Return what rank 1 did: exchanges by number, products by their rows, weights' gradients."""
    ranks = ThreadedRanks(case.ranks, monkeypatch)
    right_outer = overlap.outer
    right_product = overlap.product

    def noted_outer(*args: Any, **kwargs: Any) -> torch.Tensor:
        ranks.note("gradient of weights")
        return right_outer(*args, **kwargs)

    def noted_product(*args: Any, **kwargs: Any) -> torch.Tensor:
        ranks.note("product")
        return right_product(*args, **kwargs)

    monkeypatch.setattr(overlap, "outer", noted_outer)
    monkeypatch.setattr(overlap, "product", noted_product)
    ranks.run(lambda rank: run_rank(ranks, rank, case, in_halves=True))
    return ranks.events[1]


# Exchange 1 is that of the counts.
FORWARD = [
    "start 2",
    "start 3",
    "wait 2",
    "product",
    "product",
    "start 4",
    "wait 3",
    "product",
    "product",
    "start 5",
    "wait 4",
    "wait 5",
]


def backward_from(first: int) -> list[str]:
    """Return the events of a backward whose first exchange has this number."""
    return [
        f"start {first}",
        f"start {first + 1}",
        f"wait {first}",
        "product",
        "product",
        f"start {first + 2}",
        f"wait {first + 1}",
        "product",
        "product",
        f"start {first + 3}",
        "gradient of weights",
        "gradient of weights",
        f"wait {first + 2}",
        f"wait {first + 3}",
    ]


def test_one_half_travels_while_the_other_is_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    assert events_of_a_step(monkeypatch, Case()) == [*FORWARD, "backward", *backward_from(6)]


def test_recomputation_sends_out_both_halves_and_nothing_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Exchange 6 is that of the counts.
    again = ["start 7", "start 8", "wait 7", "product", "wait 8", "product"]
    events = events_of_a_step(monkeypatch, Case(recompute="recompute"))
    assert events == [*FORWARD, "backward", *again, *backward_from(9)]


def test_recomputation_of_kept_rows_exchanges_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    events = events_of_a_step(monkeypatch, Case(recompute="keep"))
    assert events == [*FORWARD, "backward", "product", "product", *backward_from(6)]


def test_labels_put_first_halves_first_and_keep_the_order_within() -> None:
    labels = label_by_half(torch.arange(10), ranks=2, num_local=5)
    # Experts 0, 1 of the first rank and 5, 6 of the second one come first.
    assert labels.argsort().tolist() == [0, 1, 5, 6, 2, 3, 4, 7, 8, 9]

"""Experts in the dtypes of training against float64, with grouped products and with the loop.

The router's choice is that of bf16 in all of them, because a choice that flips changes everything.
Tolerances, relative in l2: fp32 2e-6, bf16 6e-3 (rounding of the products' results, 2^-9 each).
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

from cpt.model.experts import function as expert_function
from cpt.model.experts.grouped import Groups, is_served
from cpt.model.experts.layer import ExpertParallelMLP, LocalExperts
from cpt.model.kernels import expert_output, gated_unit
from cpt.model.kernels.expert_rows import experts_of_rows, inner, weighted_sums
from cpt.parallel.traffic import Traffic

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 6e-3}
SHAPES = {
    "M!=I": (64, 96, 8, 4, 512),
    "M==I": (64, 64, 8, 4, 512),
    "128 experts": (32, 32, 128, 4, 1024),
    "65k tokens": (32, 32, 4, 2, 65_536),
}
"""Model size, expert size, experts, experts per token, tokens."""


def topology() -> Any:
    """A rank that exchanges nothing."""
    return SimpleNamespace(ep_size=1, ep_rank=0, ep_group=None, traffic=Traffic())


def draw(shape: tuple[int, ...]) -> tuple[GptOssMLP, Tensor, Tensor]:
    """transformers' layer, its input and the gradient of its output: float64, but exact in bf16."""
    model_size, expert_size, num_experts, top_k, tokens = shape
    config = GptOssConfig(
        hidden_size=model_size,
        intermediate_size=expert_size,
        num_local_experts=num_experts,
        num_experts_per_tok=top_k,
    )
    config._experts_implementation = "eager"
    mlp = GptOssMLP(config)
    generator = torch.Generator().manual_seed(3)
    stds = {
        "weight": model_size**-0.5,
        "gate_up_proj": model_size**-0.5,
        "down_proj": expert_size**-0.5,
    }
    for name, parameter in mlp.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        parameter.data = drawn * stds.get(name.rsplit(".", 1)[1], 0.3)
    hidden, d_out = torch.randn(2, 1, tokens, model_size, generator=generator).bfloat16().double()
    return mlp.bfloat16().double().train(), hidden, d_out


def fix_choice(mlp: torch.nn.Module, choice_Nk: Tensor) -> None:
    router: Any = mlp.router

    def forward(hidden_NM: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = torch.nn.functional.linear(hidden_NM, router.weight, router.bias)
        return logits, logits.gather(1, choice_Nk).softmax(1), choice_Nk

    router.forward = forward


def output_and_gradients(mlp: torch.nn.Module, hidden: Tensor, d_out: Tensor) -> dict[str, Tensor]:
    hidden = hidden.clone().requires_grad_()
    out = mlp(hidden)[0]
    out.backward(d_out)
    assert hidden.grad is not None
    return {
        "output": out.detach(),
        "hidden": hidden.grad,
        **{name: p.grad for name, p in mlp.named_parameters()},
    }


@dataclass(frozen=True)
class Case:
    source: GptOssMLP
    hidden: Tensor
    d_out: Tensor
    choice: Tensor
    expected: dict[str, Tensor]


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    source, hidden, d_out = draw(SHAPES[request.param])
    choice = copy.deepcopy(source.router).bfloat16()(hidden.bfloat16()[0])[2]
    expected_mlp = copy.deepcopy(source)
    fix_choice(expected_mlp, choice)
    return Case(source, hidden, d_out, choice, output_and_gradients(expected_mlp, hidden, d_out))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("grouped", [True, False], ids=["grouped", "loop"])
def test_value_and_every_gradient_are_those_of_transformers_in_float64(
    case: Case, dtype: torch.dtype, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlp = ExpertParallelMLP(copy.deepcopy(case.source).to(dtype), topology())
    fix_choice(mlp, case.choice)
    hidden = case.hidden.to(dtype)
    assert is_served(hidden[0], hidden.shape[2])
    monkeypatch.setattr(expert_function, "is_served", lambda *_: grouped)
    found = output_and_gradients(mlp, hidden, case.d_out.to(dtype))
    errors = {n: float((found[n].double() - e).norm() / e.norm()) for n, e in case.expected.items()}
    assert max(errors.values()) <= TOLERANCE[dtype], errors
    if dtype is torch.bfloat16 and hidden.shape[1] == 65_536:
        biases = {
            name: error
            for name, error in errors.items()
            if name.startswith("experts.") and "bias" in name
        }
        assert len(biases) == 2 and max(biases.values()) <= 5e-3, biases


@pytest.mark.parametrize("counts", [(7, 0, 20, 0), (0, 0, 0, 27), (27, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_grouped_products_and_the_loop_agree_on_any_distribution(
    counts: tuple[int, ...], dtype: torch.dtype
) -> None:
    source = draw((16, 24, 4, 2, 27))
    rows = source[1][0, :, :16].to(dtype)
    weights = torch.linspace(0.1, 1, 27, dtype=dtype)
    results = []
    for grouped in (True, False):
        experts = LocalExperts(copy.deepcopy(source[0].experts).to(dtype), 0, 4)
        leaves = [rows.clone().requires_grad_(), weights.clone().requires_grad_()]
        out = experts(*leaves, Groups(torch.tensor(counts)), grouped)
        out.backward(source[2][0].to(dtype))
        results.append([out.detach(), *(leaf.grad for leaf in [*leaves, *experts.parameters()])])
    for found, expected in zip(*results, strict=True):
        assert (found - expected).norm() <= 2 * TOLERANCE[dtype] * expected.norm()


@pytest.mark.parametrize("counts", [(7, 0, 1020, 0), (0, 0, 0, 1027)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_sums_over_rows_are_those_of_float64(counts: tuple[int, ...], dtype: torch.dtype) -> None:
    ends = Groups(torch.tensor(counts)).ends_E
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(1027, 24, generator=generator).to(dtype)
    weights = torch.rand(1027, generator=generator).to(dtype)
    vectors = torch.randn(4, 24, generator=generator).to(dtype)
    member_RE = torch.nn.functional.one_hot(experts_of_rows(ends, 1027), 4).double()
    sums = (member_RE * weights.double()[:, None]).T @ rows.double()
    plain = member_RE.T @ rows.double()
    products = (rows.double() * (member_RE @ vectors.double())).sum(1)
    for found, expected in (
        (weighted_sums(rows, weights, ends), sums),
        (weighted_sums(rows, None, ends), plain),
        (inner(rows, vectors, ends), products),
    ):
        assert found.shape == expected.shape
        assert (found.double() - expected).norm() <= 2e-6 * expected.norm()


@pytest.mark.parametrize("counts", [(2, 0, 3, 0), (0, 0), (0, 4), (5,)], ids=str)
def test_expert_of_each_row_is_found_from_the_ends(counts: tuple[int, ...]) -> None:
    expected: list[int] = []
    for expert, count in enumerate(counts):
        expected += [expert] * count
    assert experts_of_rows(Groups(torch.tensor(counts)).ends_E, sum(counts)).tolist() == expected


def test_second_backward_through_the_same_graph_is_refused_rather_than_wrong() -> None:
    """The first one wrote the gradient of gate_up over gate_up."""
    source, hidden, d_out = draw((16, 24, 4, 2, 27))
    out = ExpertParallelMLP(source, topology())(hidden.clone().requires_grad_())[0]
    out.backward(d_out, retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.backward(d_out)


@pytest.mark.parametrize(
    "frozen", ["gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"]
)
def test_frozen_tensor_gets_no_gradient_and_changes_no_other(frozen: str) -> None:
    source, hidden, d_out = draw((16, 24, 4, 2, 27))
    mlp = ExpertParallelMLP(copy.deepcopy(source), topology())
    expected = output_and_gradients(copy.deepcopy(mlp), hidden, d_out)
    getattr(mlp.experts, frozen).requires_grad_(False)
    found = output_and_gradients(mlp, hidden, d_out)
    assert found.pop(f"experts.{frozen}") is None
    assert all(torch.equal(gradient, expected[name]) for name, gradient in found.items())


def test_gradient_work_of_frozen_experts_is_not_done(monkeypatch: pytest.MonkeyPatch) -> None:
    source, hidden, d_out = draw((16, 24, 4, 2, 27))
    mlp = ExpertParallelMLP(source, topology())
    mlp.experts.requires_grad_(False)
    monkeypatch.setattr(expert_function, "outer", None)  # calling it would fail
    monkeypatch.setattr(gated_unit, "weighted_sums", None)
    monkeypatch.setattr(expert_output, "weighted_sums", None)
    assert output_and_gradients(mlp, hidden, d_out)["hidden"].isfinite().all()


def test_backward_reads_what_the_parameters_hold_then() -> None:
    """ZeRO-3 takes the storage away after the forward and gives another before the backward."""
    source, hidden, d_out = draw((16, 24, 4, 2, 27))
    mlp = ExpertParallelMLP(source, topology())
    expected = output_and_gradients(copy.deepcopy(mlp), hidden, d_out)["hidden"]
    leaf = hidden.clone().requires_grad_()
    out = mlp(leaf)[0]
    gathered = {name: p.data for name, p in mlp.experts.named_parameters()}
    alive = [tensor.untyped_storage()._weak_ref() for tensor in gathered.values()]
    copies = {name: tensor.clone() for name, tensor in gathered.items()}
    for parameter in mlp.experts.parameters():
        parameter.data = torch.empty(0, dtype=parameter.dtype)
    del gathered
    assert all(torch.UntypedStorage._expired(ref) for ref in alive)
    for name, parameter in mlp.experts.named_parameters():
        parameter.data = copies[name]
    out.backward(d_out)
    assert leaf.grad is not None and torch.equal(leaf.grad, expected)

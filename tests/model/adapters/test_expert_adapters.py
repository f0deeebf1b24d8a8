"""Adapters of experts give what autograd gives through W + s A B, and no work is done for W.

In float64, where only the order of sums differs.
"""

from __future__ import annotations

import copy
from collections import Counter
from typing import Any

import pytest
import torch

from cpt.model.experts import adapter_products, function
from cpt.model.experts.grouped import Groups
from cpt.model.experts.layer import EXPERT_TENSORS, LocalExperts
from tests.support.expert_adapters import RANK, SCALE, add_adapters, fill_adapters

MODEL_SIZE, EXPERT_SIZE, NUM_EXPERTS = 24, 40, 5
COUNTS = [7, 0, 11, 3, 9]
MATRICES = ("gate_up_proj", "down_proj")


def drawn_experts(dtype: torch.dtype = torch.float64) -> LocalExperts:
    generator = torch.Generator().manual_seed(3)
    shapes = {
        "gate_up_proj": (NUM_EXPERTS, MODEL_SIZE, 2 * EXPERT_SIZE),
        "gate_up_proj_bias": (NUM_EXPERTS, 2 * EXPERT_SIZE),
        "down_proj": (NUM_EXPERTS, EXPERT_SIZE, MODEL_SIZE),
        "down_proj_bias": (NUM_EXPERTS, MODEL_SIZE),
    }
    source: Any = torch.nn.Module()
    source.alpha, source.limit = 1.702, 7.0
    for name, shape in shapes.items():
        value = torch.randn(shape, generator=generator, dtype=torch.float64) * 0.5
        setattr(source, name, torch.nn.Parameter(value.to(dtype)))
    experts = LocalExperts(source, 0, NUM_EXPERTS)
    for parameter in experts.parameters():
        parameter.requires_grad_(False)
    return experts


def with_dense_sum(experts: LocalExperts) -> LocalExperts:
    """Return experts whose weights are W + s A B, formed by autograd from the same leaves."""
    dense = copy.deepcopy(experts)
    for matrix in MATRICES:
        found = dense._adapter_names.pop(matrix, None)
        if found is None:
            continue
        a, b = (getattr(dense, name) for name in found)
        summed = getattr(dense, matrix).detach() + SCALE * (a @ b)
        del dense._parameters[matrix]
        setattr(dense, matrix, summed)
    return dense


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    rows = torch.randn(sum(COUNTS), MODEL_SIZE, generator=generator, dtype=torch.float64)
    weights = torch.rand(sum(COUNTS), generator=generator, dtype=torch.float64)
    return rows.to(dtype).requires_grad_(), weights.to(dtype).requires_grad_()


def output_and_gradients(experts: LocalExperts) -> dict[str, torch.Tensor]:
    dtype = experts.down_proj_bias.dtype
    rows, weights = inputs(dtype)  # type: ignore[arg-type]
    out = experts(rows, weights, Groups(torch.tensor(COUNTS)))
    slope = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view_as(out)
    (out * slope.to(out.dtype)).sum().backward()
    found = {"output": out.detach(), "rows": rows.grad, "weights": weights.grad}
    for name, parameter in experts.named_parameters():
        if parameter.requires_grad:
            found[name] = parameter.grad
    return found  # type: ignore[return-value]


@pytest.mark.parametrize("matrices", [MATRICES, MATRICES[:1], MATRICES[1:]], ids=str)
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_output_and_every_gradient_are_those_of_the_dense_sum(
    shared: bool, matrices: tuple[str, ...]
) -> None:
    experts = drawn_experts()
    fill_adapters(add_adapters(experts, shared=shared, matrices=matrices))
    expected = output_and_gradients(with_dense_sum(experts))
    found = output_and_gradients(experts)
    assert found.keys() == expected.keys() and len(found) == 3 + 2 * len(matrices)
    for name, tensor in expected.items():
        error = (found[name] - tensor).norm() / tensor.norm()
        assert error <= 1e-13, f"{name}: {error}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_grouped_products_agree_with_float64(dtype: torch.dtype) -> None:
    experts = drawn_experts(dtype)
    fill_adapters(add_adapters(experts))
    exact = copy.deepcopy(experts).double()
    expected = output_and_gradients(exact)
    found = output_and_gradients(experts)
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    for name, tensor in expected.items():
        error = (found[name].double() - tensor).norm() / tensor.norm()
        assert error <= tolerance, f"{name}: {error}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_an_expert_without_rows_has_zero_gradients(dtype: torch.dtype) -> None:
    experts = drawn_experts(dtype)
    fill_adapters(add_adapters(experts))
    found = output_and_gradients(experts)
    for matrix in MATRICES:
        for part in ("lora_A", "lora_B"):
            gradient = found[f"{matrix}_{part}"]
            assert not gradient[1].any()
            assert gradient[[0, 2, 3, 4]].flatten(1).any(1).all()


def test_no_rows_at_all_give_zero_gradients() -> None:
    experts = drawn_experts(torch.float32)
    added = add_adapters(experts)
    fill_adapters(added)
    rows = torch.empty(0, MODEL_SIZE, requires_grad=True)
    out = experts(rows, torch.empty(0), Groups(torch.zeros(NUM_EXPERTS, dtype=torch.int64)))
    out.sum().backward()
    assert all(not parameter.grad.any() for parameter in added.values())  # type: ignore[union-attr]


def test_frozen_weights_cost_no_gradient_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide products: forward two, backward two for the rows, and none for the weights."""
    counted: Counter[str] = Counter()

    def count(module: Any, name: str) -> None:
        right = getattr(module, name)

        def counting(left: torch.Tensor, right_or_matrices: Any, *rest: Any, **kwargs: Any) -> Any:
            narrow = RANK in (left.shape[-1], right_or_matrices.shape[-1])
            counted[f"{'narrow' if narrow else 'wide'} {name}"] += 1
            return right(left, right_or_matrices, *rest, **kwargs)

        monkeypatch.setattr(module, name, counting)

    for module in (function, adapter_products):
        count(module, "product")
        count(module, "outer")
    experts = drawn_experts(torch.float32)
    fill_adapters(add_adapters(experts))
    output_and_gradients(experts)
    # Per matrix: x A and (x A) B forward; d_inner, d_inner A^T and x A again backward.
    assert counted == {"wide product": 4, "narrow product": 10, "narrow outer": 4}
    for name in EXPERT_TENSORS:
        assert getattr(experts, name).grad is None


@torch.no_grad()
def test_experts_computed_apart_use_their_adapters() -> None:
    experts = drawn_experts()
    fill_adapters(add_adapters(experts))
    rows, weights = inputs()
    together = experts(rows, weights, Groups(torch.tensor(COUNTS)))
    apart = experts.each_apart(rows, weights, torch.tensor(COUNTS))
    torch.testing.assert_close(apart, together, rtol=1e-13, atol=1e-13)
    plain = drawn_experts().each_apart(rows, weights, torch.tensor(COUNTS))
    assert (apart - plain).norm() > 0.01 * plain.norm()

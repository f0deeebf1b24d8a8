"""The experts as a whole with every kernel, against themselves without one in float64."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from cpt.model.experts.grouped import Groups
from cpt.model.experts.layer import LocalExperts
from cpt.model.kernels import expert_output, gated_unit
from cpt.model.weights.hf_layout import EXPERT_TENSORS

COUNTS = (7, 0, 37, 3)
MODEL_SIZE = 24
EXPERT_SIZE = 40


def draw_experts() -> LocalExperts:
    generator = torch.Generator().manual_seed(1)
    experts = len(COUNTS)
    shapes = (
        (experts, MODEL_SIZE, 2 * EXPERT_SIZE),
        (experts, 2 * EXPERT_SIZE),
        (experts, EXPERT_SIZE, MODEL_SIZE),
        (experts, MODEL_SIZE),
    )
    source = SimpleNamespace(alpha=1.702, limit=7.0)
    for name, shape in zip(EXPERT_TENSORS, shapes, strict=True):
        setattr(source, name, torch.randn(shape, generator=generator))
    return LocalExperts(source, 0, experts)


def output_and_gradients(
    experts: LocalExperts, dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    experts = copy.deepcopy(experts).to(dtype).to(device)
    generator = torch.Generator().manual_seed(2)
    num_rows = sum(COUNTS)
    rows = torch.randn(num_rows, MODEL_SIZE, generator=generator).to(dtype).to(device)
    weights = torch.rand(num_rows, generator=generator).to(dtype).to(device)
    d_out = torch.randn(num_rows, MODEL_SIZE, generator=generator).to(dtype).to(device)
    leaves = [rows.requires_grad_(), weights.requires_grad_(), *experts.parameters()]
    out = experts(rows, weights, Groups(torch.tensor(COUNTS, device=device)))
    out.backward(d_out)
    results = [out.detach()]
    for leaf in leaves:
        assert leaf.grad is not None
        results.append(leaf.grad)
    return results


def test_output_and_every_gradient_are_those_of_float64(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """1e-6, relative in l2: products and sums in fp32, not in the same order."""
    experts = draw_experts()
    expected = output_and_gradients(experts, torch.float64, torch.device("cpu"))
    launched = []

    def always(rows: torch.Tensor) -> bool:
        launched.append(rows.shape)
        return True

    monkeypatch.setattr(gated_unit, "fused_kernels_run_on", always)
    monkeypatch.setattr(expert_output, "fused_kernels_run_on", always)
    found = output_and_gradients(experts, torch.float32, kernel_device)
    assert len(launched) == 4
    for value, exact in zip(found, expected, strict=True):
        assert (value.cpu().double() - exact).norm() <= 1e-6 * exact.norm()


def test_second_backward_through_the_kernels_is_refused_rather_than_wrong(
    kernel_device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first one wrote the gradient of gate_up over gate_up, which torch can not see."""
    monkeypatch.setattr(gated_unit, "fused_kernels_run_on", lambda rows: True)
    experts = draw_experts().to(kernel_device)
    rows = torch.randn(sum(COUNTS), MODEL_SIZE, device=kernel_device, requires_grad=True)
    weights = torch.rand(sum(COUNTS), device=kernel_device)
    out = experts(rows, weights, Groups(torch.tensor(COUNTS, device=kernel_device)))
    out.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()

"""An adapted linear layer gives what PEFT's own layer gives, and every gradient of it."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from torch import nn

from cpt.model.adapters.linear import AdaptedLinear, adapted_row_norms

RANK = 4
IN_SIZE, OUT_SIZE = 24, 40
SCALE = 2.0


def peft_layer(source: nn.Linear, *, use_dora: bool) -> Any:
    config = peft.LoraConfig(
        r=RANK, lora_alpha=SCALE * RANK, target_modules=["0"], use_dora=use_dora
    )
    return peft.get_peft_model(nn.Sequential(source), config, autocast_adapter_dtype=False)


def filled(use_dora: bool) -> tuple[Any, AdaptedLinear]:
    """Return PEFT's layer and ours with the same values, B and bias not zero."""
    torch.manual_seed(5)
    source = nn.Linear(IN_SIZE, OUT_SIZE).double()
    wrapped = peft_layer(source, use_dora=use_dora)
    theirs = wrapped.base_model.model[0]
    ours = AdaptedLinear(source, RANK, SCALE, with_magnitude=use_dora)
    pairs = [(ours.lora_A, theirs.lora_A), (ours.lora_B, theirs.lora_B)]
    if ours.lora_magnitude is not None:
        pairs.append((ours.lora_magnitude, theirs.lora_magnitude_vector))
    with torch.no_grad():
        for parameter, module in pairs:
            other = module["default"].weight
            other.add_(torch.randn_like(other) * 0.1)
            parameter.copy_(other)
    ours.weight.requires_grad_(False)
    ours.bias.requires_grad_(False)
    return wrapped, ours


@pytest.mark.parametrize("use_dora", [False, True], ids=["lora", "dora"])
def test_output_and_every_gradient_are_those_of_peft(use_dora: bool) -> None:
    theirs, ours = filled(use_dora)
    inputs = torch.randn(3, 7, IN_SIZE, dtype=torch.float64)
    slope = torch.randn(3, 7, OUT_SIZE, dtype=torch.float64)
    found = {}
    for name, layer in (("theirs", theirs), ("ours", ours)):
        x = inputs.clone().requires_grad_()
        out = layer(x)
        (out * slope).sum().backward()
        found[name] = [out.detach(), x.grad]
    for part, other in zip(found["theirs"], found["ours"], strict=True):
        torch.testing.assert_close(other, part, rtol=1e-12, atol=1e-12)
    gradients = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert len(gradients) == 2 + use_dora
    own = dict(ours.named_parameters())
    for name, gradient in gradients.items():
        kind = name.split(".default")[0].rpartition(".")[2]
        mine = own[kind.removesuffix("_vector")].grad
        torch.testing.assert_close(mine, gradient, rtol=1e-11, atol=1e-11)


def test_frozen_weight_gets_no_gradient() -> None:
    _, ours = filled(use_dora=True)
    ours(torch.randn(5, IN_SIZE, dtype=torch.float64)).sum().backward()
    assert ours.weight.grad is None and ours.bias.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dora_begins_as_the_layer_below_it(dtype: torch.dtype) -> None:
    torch.manual_seed(6)
    source = nn.Linear(IN_SIZE, OUT_SIZE).to(dtype)
    ours = AdaptedLinear(source, RANK, SCALE, with_magnitude=True)
    assert ours.lora_magnitude is not None
    with torch.no_grad():
        ours.lora_A.normal_()
        ours.lora_B.zero_()
        ours.lora_magnitude.copy_(torch.linalg.norm(source.weight.float(), dim=1))
        inputs = torch.randn(9, IN_SIZE).to(dtype)
        wanted = torch.nn.functional.linear(inputs, source.weight) + source.bias
        assert torch.equal(ours(inputs), wanted)


def test_norms_of_adapted_rows_are_those_of_the_dense_sum() -> None:
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(50, 30, generator=generator)
    a = torch.randn(RANK, 30, generator=generator)
    b = torch.randn(50, RANK, generator=generator)
    wanted = torch.linalg.norm((weight + 0.5 * b @ a).double(), dim=1).float()
    torch.testing.assert_close(adapted_row_norms(weight, a, b, 0.5), wanted)


def test_a_row_that_the_adapter_takes_away_has_no_norm_below_zero() -> None:
    weight = torch.ones(2, 8)
    a = torch.ones(1, 8)
    b = torch.tensor([[-1.0], [0.0]])
    norms = adapted_row_norms(weight, a, b, 1.0)
    assert norms[0] == 0
    assert norms[1] == torch.linalg.norm(weight[1])

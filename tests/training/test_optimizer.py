"""Routers can be put into optimizer groups of their own, which a rate of 0 leaves as they are."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from cpt.training.engine import TrainingEngine
from cpt.training.optimizer import ROUTER_GROUPS, parameter_groups


class Block(nn.Module):
    """A layer with the names of gpt-oss."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4, bias=False)
        self.mlp = nn.ModuleDict({"router": nn.Linear(4, 3), "down": nn.Linear(4, 4)})


def names_by_group(model: nn.Module, groups: list[dict[str, Any]]) -> dict[str, set[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        group["name"]: {names[id(parameter)] for parameter in group["params"]} for group in groups
    }


def test_groups_without_a_separate_one_are_those_of_decay_alone() -> None:
    model = Block()
    groups = names_by_group(model, parameter_groups(model, 0.1))
    assert groups == {
        "decay": {"mlp.router.weight", "mlp.down.weight"},
        "no_decay": {"norm.weight", "mlp.router.bias", "mlp.down.bias"},
    }


def test_separate_routers_keep_their_decay_and_are_in_no_other_group() -> None:
    model = nn.ModuleDict({"block": Block()})
    groups = parameter_groups(model, 0.1, separate_routers=True)
    decay, no_decay = ROUTER_GROUPS
    assert names_by_group(model, groups) == {
        "decay": {"block.mlp.down.weight"},
        "no_decay": {"block.norm.weight", "block.mlp.down.bias"},
        decay: {"block.mlp.router.weight"},
        no_decay: {"block.mlp.router.bias"},
    }
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.1, 0.0]


def test_frozen_routers_stay_bit_for_bit_and_can_be_trained_again() -> None:
    torch.manual_seed(1)
    model = nn.ModuleDict({"block": Block()})
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.1, separate_routers=True), lr=0.1)
    engine: Any = object.__new__(TrainingEngine)
    engine.deepspeed = SimpleNamespace(optimizer=optimizer)
    router = model["block"].mlp["router"]
    seen = []
    for frozen in (False, True, True, False):
        engine.set_learning_rate(0.1, routers_frozen=frozen)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        others = model["block"].mlp["down"].weight.detach().clone()
        optimizer.step()
        assert not torch.equal(others, model["block"].mlp["down"].weight)
        seen.append((router.weight.detach().clone(), router.bias.detach().clone()))
    for before, after, is_same in zip(seen, seen[1:], (True, True, False), strict=False):
        for first, second in zip(before, after, strict=True):
            assert torch.equal(first, second) == is_same

"""Sources of weights, and how the tensors of a model are filled from one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

import torch

from cpt.model.gpt_oss import GptOssForCPT
from cpt.model.weights.hf_layout import is_expert_name


class WeightSource(Protocol):
    """Where weights come from."""

    def pieces(self, name: str, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Elements [start, stop) of the flattened global tensor `name`, as (position of the first,
        1-D values).
        """
        ...


@torch.no_grad()
def fill_parts(targets: Mapping[str, tuple[torch.Tensor, int]], source: WeightSource) -> None:
    """Write a part of every tensor.

    Args:
        targets: By parameter name: a 1-D view to write to, and the position of its first element in
            the flattened global tensor.  Values are cast to its dtype.
        source: Where the values come from.
    """
    for name, (view, offset) in targets.items():
        for position, values in source.pieces(name, offset, offset + view.numel()):
            view[position - offset : position - offset + values.numel()].copy_(values)


def fill_model(model: GptOssForCPT, source: WeightSource) -> None:
    """Fill a materialised model without ZeRO: every tensor, of the experts this rank's."""
    first_expert = model.model.layers[0].mlp.experts.first_expert
    targets = {}
    for name, parameter in model.named_parameters():
        expert_numel = parameter.numel() // parameter.shape[0] if is_expert_name(name) else 0
        targets[name] = (parameter.detach().view(-1), first_expert * expert_numel)
    fill_parts(targets, source)

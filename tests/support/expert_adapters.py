"""Adapters beside the experts of one layer, with values that hide no mistake."""

from __future__ import annotations

import torch
from torch import nn

from cpt.model.experts.layer import LocalExperts

RANK = 8
SCALE = 0.5


def add_adapters(
    experts: LocalExperts, *, shared: bool = False, matrices: tuple[str, ...] = ()
) -> dict[str, nn.Parameter]:
    """Give the experts of a rank adapters, without values; return them by name.

    Args:
        experts: The experts.
        shared: Whether one serves all of them.
        matrices: Those with an adapter; both without any.
    """
    added = {}
    word = "shared_" if shared else ""
    axis = () if shared else (experts.num_experts,)
    for matrix in matrices or ("gate_up_proj", "down_proj"):
        weight = getattr(experts, matrix)
        in_size, out_size = weight.shape[1:]
        a = nn.Parameter(weight.detach().new_empty(*axis, in_size, RANK))
        b = nn.Parameter(weight.detach().new_empty(*axis, RANK, out_size))
        names = (f"{matrix}_{word}lora_A", f"{matrix}_{word}lora_B")
        experts.add_adapter(matrix, names[0], a, names[1], b, SCALE)
        added.update(zip(names, (a, b), strict=True))
    return added


@torch.no_grad()
def fill_adapters(adapters: dict[str, nn.Parameter], first_expert: int = 0) -> None:
    """Draw values by name and number of the expert; B is not zero, as A had no gradient then."""
    for name, parameter in adapters.items():
        drawn = torch.empty_like(parameter)
        for index, part in enumerate(drawn if parameter.ndim == 3 else [drawn]):
            expert = first_expert + index if parameter.ndim == 3 else 0
            seed = sum(map(ord, name)) * 1000 + expert
            generator = torch.Generator().manual_seed(seed)
            part.copy_(torch.randn(part.shape, generator=generator) * 0.2)
        parameter.copy_(drawn)

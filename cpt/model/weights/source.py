"""Sources of weights, and how the tensors of a model are filled from one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

import torch

from cpt.model.weights.hf_layout import is_expert_name
from data_pipeline.console.progress import show_progress

if TYPE_CHECKING:  # it imports DeepSpeed, which readers of weights do not need
    from cpt.model.gpt_oss import GptOssForCPT


class WeightSource(Protocol):
    """A place that weights come from: a directory, a checkpoint, a random generator."""

    def pieces(self, name: str, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield elements [start, stop) of the flattened global tensor `name`, piece by piece.

        Each piece is (position of its first element, 1-D values).
        """
        ...


def read_window(source: WeightSource, name: str, start: int, stop: int) -> torch.Tensor:
    """Return elements [start, stop) of a flattened tensor as one new tensor."""
    return torch.cat([values for _, values in source.pieces(name, start, stop)])


@torch.no_grad()
def fill_parts(targets: Mapping[str, tuple[torch.Tensor, int]], source: WeightSource) -> None:
    """Fill a part of every tensor.

    Args:
        targets: By parameter name, a 1-D view to write to and the position of its first element in
            the flattened global tensor. Values are cast to the dtype of the view.
        source: The place that the values come from.
    """
    total = sum(view.numel() for view, _ in targets.values())
    bar = show_progress(total, "reading weights", "value", unit_scale=True, leave=False)
    with bar:
        for name, (view, offset) in targets.items():
            for position, values in source.pieces(name, offset, offset + view.numel()):
                first = position - offset
                view[first : first + values.numel()].copy_(values)
                bar.update(values.numel())


def fill_model(model: GptOssForCPT, source: WeightSource) -> None:
    """Fill a materialized model that ZeRO does not cut: every tensor, and this rank's experts."""
    first_expert = model.model.layers[0].mlp.experts.first_expert
    targets = {}
    for name, parameter in model.named_parameters():
        offset = 0
        if is_expert_name(name):
            offset = first_expert * (parameter.numel() // parameter.shape[0])
        targets[name] = (parameter.detach().view(-1), offset)
    fill_parts(targets, source)

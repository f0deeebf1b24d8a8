"""Put adapters into a patched model before it has weights, and freeze everything else."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import nn

from cpt.deepspeed_adapter.experts import mark_expert
from cpt.model.adapters.layout import AdaptedMatrix, is_adapter_name
from cpt.model.adapters.linear import AdaptedLinear
from cpt.model.experts.layer import LocalExperts
from cpt.model.gpt_oss import GptOssForCPT
from cpt.model.parameters import parameter_numels


@dataclass(frozen=True, kw_only=True, slots=True)
class AttachReport:
    """The adapters of a model over all ranks, for the log."""

    matrices: int
    """Matrices with an adapter; those of all experts of a layer count as one."""
    adapter_values: int
    """Values that are trained."""
    model_values: int
    """Values below the adapters."""

    def __str__(self) -> str:
        share = self.adapter_values / self.model_values
        return (
            f"{self.matrices} matrices, {self.adapter_values:,} trained parameters, "
            f"{share:.3%} of the {self.model_values:,} below them, which stay as they are"
        )


def attach_adapters(
    model: GptOssForCPT, matrices: list[AdaptedMatrix], scale: float, ep_size: int
) -> AttachReport:
    """Give matrices of a patched model their adapters, without values, and freeze the rest.

    Args:
        model: A patched model on the meta device.
        matrices: What `adapted_matrices` returns.
        scale: The factor s of every adapter.
        ep_size: Ranks that together hold all experts of a layer.

    Returns:
        What there is now over all ranks.
    """
    adapter_values = 0
    for matrix in matrices:
        module_name, _, last = matrix.name.rpartition(".")
        owner = model.get_submodule(module_name)
        if isinstance(owner, LocalExperts):
            _adapt_experts(owner, matrix, last, scale, ep_size)
        else:
            linear = getattr(owner, last)
            with_magnitude = matrix.has_magnitude
            adapted = AdaptedLinear(linear, matrix.rank, scale, with_magnitude=with_magnitude)
            setattr(owner, last, adapted)
        adapter_values += sum(math.prod(shape) for shape in matrix.shapes().values())
    freeze_below_adapters(model)
    return AttachReport(
        matrices=len(matrices),
        adapter_values=adapter_values,
        model_values=sum(parameter_numels(model.config).values()),
    )


def _adapt_experts(
    experts: LocalExperts, matrix: AdaptedMatrix, last: str, scale: float, ep_size: int
) -> None:
    like = next(experts.parameters())
    tensors = []
    for name, shape in matrix.shapes().items():
        has_axis = matrix.num_experts is not None
        if has_axis:
            shape = (experts.num_experts, *shape[1:])
        parameter = nn.Parameter(like.new_empty(shape))
        if has_axis:
            mark_expert(parameter, ep_size)
        tensors.append((name.rpartition(".")[2], parameter))
    (a_name, a), (b_name, b) = tensors
    experts.add_adapter(last, a_name, a, b_name, b, scale)


def freeze_below_adapters(model: nn.Module) -> None:
    """Take everything but adapters out of training."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter_name(name))

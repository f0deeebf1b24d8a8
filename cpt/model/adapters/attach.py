"""Put adapters into a patched model before it has weights, and freeze everything else."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from cpt.deepspeed_adapter.experts import mark_expert
from cpt.errors import InternalError
from cpt.model.adapters.layout import AdaptedMatrix, is_adapter_name
from cpt.model.adapters.linear import AdaptedLinear
from cpt.model.experts.layer import LocalExperts
from cpt.model.gpt_oss import GptOssForCPT


def attach_adapters(
    model: GptOssForCPT, matrices: Iterable[AdaptedMatrix], scale: float, ep_size: int
) -> None:
    """Give matrices of a patched model their adapters, without values, and freeze the rest.

    Args:
        model: A patched model on the meta device.
        matrices: What `adapted_matrices` returns.
        scale: The factor s of every adapter.
        ep_size: Ranks that together hold all experts of a layer.

    Raises:
        InternalError: There is no matrix, so nothing would be trained.
    """
    matrices = list(matrices)
    if not matrices:
        raise InternalError("The adapter section is on and names no matrix: nothing would train.")
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
    freeze_below_adapters(model)


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

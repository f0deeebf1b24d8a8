"""Bias and routing weight of the experts' outputs, forward and backward, as two operators.

    out = weight * (product + bias)

Passes over memory on a GPU: `expert_output` reads and writes out; `expert_output_backward` reads
d_out once for both gradients, and writes and reads fp32 sums of every 16 rows for that of the bias,
a quarter of a pass in bf16.

Shape letters: R rows sorted by expert, M model size, E experts.
"""

from __future__ import annotations

import torch

from cpt.model.kernels.availability import fused_kernels_run_on
from cpt.model.kernels.expert_rows import (
    blocks,
    experts_of_rows,
    inner,
    weighted_sums,
    widen,
)


@torch.library.custom_op("cpt::expert_output", mutates_args=("out_RM",))
def expert_output(
    out_RM: torch.Tensor, bias_EM: torch.Tensor, weights_R: torch.Tensor, ends_E: torch.Tensor
) -> None:
    """Add the bias of its expert to each row and multiply by the row's weight, in place.

    Args:
        out_RM: The rows; contiguous.
        bias_EM: The bias of each expert.
        weights_R: Routing weight of each row.
        ends_E: First row after each expert's, int32.
    """
    if fused_kernels_run_on(out_RM):
        from cpt.model.kernels import triton_expert_output

        triton_expert_output.forward(out_RM, bias_EM, weights_R, ends_E, out_RM)
        return
    experts_R = experts_of_rows(ends_E, out_RM.shape[0])
    for block in blocks(out_RM):
        biased = widen(out_RM[block]).add_(bias_EM[experts_R[block]])
        out_RM[block] = biased.mul_(weights_R[block, None])


@expert_output.register_fake
def _expert_output_shape(
    out_RM: torch.Tensor, bias_EM: torch.Tensor, weights_R: torch.Tensor, ends_E: torch.Tensor
) -> None:
    return None


@torch.library.custom_op("cpt::expert_output_backward", mutates_args=())
def expert_output_backward(
    d_out_RM: torch.Tensor,
    hidden_products_R: torch.Tensor,
    bias_EM: torch.Tensor,
    weights_R: torch.Tensor,
    ends_E: torch.Tensor,
    need_weights: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the gradients of weights and bias, each empty if it is not wanted.

    The gradient of a weight is <d_out, product + bias>, and <d_out, product> = <d_hidden, hidden>.

    Args:
        d_out_RM: Gradient of the outputs; contiguous.
        hidden_products_R: <d_hidden, hidden> of each row in fp32.
        bias_EM: The bias of each expert.
        weights_R: Routing weight of each row.
        ends_E: First row after each expert's, int32.
        need_weights: Whether the gradient of the weights is wanted.
        need_bias: Whether the gradient of the bias is wanted.

    Returns:
        The gradients (R,) and (E, M), in the dtypes of weights and bias.
    """
    d_weights_R, d_bias_EM = _new_gradients(bias_EM, weights_R, need_weights, need_bias)
    if fused_kernels_run_on(d_out_RM):
        from cpt.model.kernels import triton_expert_output

        triton_expert_output.backward(
            d_out_RM,
            hidden_products_R,
            bias_EM,
            weights_R,
            ends_E,
            d_weights_R=d_weights_R if need_weights else None,
            d_bias_EM=d_bias_EM if need_bias else None,
        )
        return d_weights_R, d_bias_EM
    if need_weights:
        d_weights_R.copy_(hidden_products_R + inner(d_out_RM, bias_EM, ends_E))
    if need_bias:
        d_bias_EM.copy_(weighted_sums(d_out_RM, weights_R, ends_E))
    return d_weights_R, d_bias_EM


@expert_output_backward.register_fake
def _expert_output_backward_shapes(
    d_out_RM: torch.Tensor,
    hidden_products_R: torch.Tensor,
    bias_EM: torch.Tensor,
    weights_R: torch.Tensor,
    ends_E: torch.Tensor,
    need_weights: bool,
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    return _new_gradients(bias_EM, weights_R, need_weights, need_bias)


def _new_gradients(
    bias_EM: torch.Tensor, weights_R: torch.Tensor, need_weights: bool, need_bias: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    d_weights_R = weights_R.new_empty(weights_R.shape if need_weights else 0)
    d_bias_EM = bias_EM.new_empty(bias_EM.shape if need_bias else 0)
    return d_weights_R, d_bias_EM

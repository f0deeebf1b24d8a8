"""Sink attention as one autograd Function around any flash kernel that knows nothing of sinks.

gpt-oss adds one learned logit per query head, the sink, to the denominator of every softmax and
gives it no value (`eager_attention_forward` in transformers' modeling_gpt_oss.py). With S = scale q
k^T over the keys that a query sees, and lse = log sum exp S:

    lse'    = logaddexp(lse, sink)
    P'      = exp(S - lse')                   out' = P' v = out exp(lse - lse')
    delta_i = <d_out_i, out'_i>               the whole softmax correction, as the sink has value 0
    dv      = P'^T d_out                      dS   = P' (d_out v^T - delta)
    dq      = scale dS k                      dk   = scale dS^T q
    dsink_h = - sum_i exp(sink_h - lse'_hi) delta_hi

A flash backward computes dq, dk and dv by these very lines from the output and the log-sum-exp that
it is handed, so it is handed out' and lse'. Nothing is lost, in contrast to `out * sigmoid(lse -
sink)` after a kernel that drops the gradient of its log-sum-exp: there dq and dk are 10-18 % off
while out, dv and dsink are right.

Conditions: no dropout, lse natural and with the scale included, the sink not scaled.

Shape letters: T tokens of all rows (flattened), H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.autograd.function import once_differentiable

from cpt.model.attention.interface import AttentionInputs, Kernel

PIECE_ELEMENTS_CPU = 2**19
"""Products that are held at once while the gradient of the sinks is summed: what a cache holds."""

PIECE_ELEMENTS_GPU = 2**25
"""The same on a GPU, 128 MiB."""


@dataclass(frozen=True)
class FoldedSinks:
    """The `Attention` that a kernel becomes when the sinks are folded into its log-sum-exp."""

    kernel: Kernel

    def __call__(self, inputs: AttentionInputs) -> torch.Tensor:
        """Attend; see `cpt.model.attention.interface.Attention`."""
        out_HTD = SinkAttention.apply(self.kernel, *inputs)  # type: ignore[no-untyped-call]
        return cast(torch.Tensor, out_HTD)


class SinkAttention(torch.autograd.Function):
    """apply(kernel, *inputs) -> out_HTD, with the fields of `AttentionInputs` one by one."""

    @staticmethod
    def forward(ctx: Any, kernel: Kernel, *fields: Any) -> torch.Tensor:
        """Run the kernel and fold the sinks into what it returned."""
        inputs = AttentionInputs(*fields)
        inputs = inputs._replace(
            q_HTD=_with_dense_heads(inputs.q_HTD),
            k_KTD=_with_dense_heads(inputs.k_KTD),
            v_KTD=_with_dense_heads(inputs.v_KTD),
        )
        out_HTD, lse_HT, extra = kernel.forward(inputs)
        # FlashAttention 2 on CUDA reports +inf for a query without keys: such a query sees the sink
        # alone.
        lse_HT.masked_fill_(lse_HT == torch.inf, -torch.inf)
        folded_HT = torch.logaddexp(lse_HT, inputs.sinks_H.to(lse_HT.dtype).unsqueeze(1))
        out_HTD.mul_((lse_HT - folded_HT).exp_().unsqueeze(2))
        ctx.save_for_backward(*inputs[:4], out_HTD, folded_HT, *extra)
        ctx.kernel = kernel
        ctx.rows = inputs.rows
        ctx.window = inputs.window
        ctx.scale = inputs.scale
        return out_HTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_HTD: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Run the kernel's backward on the folded results, and sum up the sinks' gradient."""
        q_HTD, k_KTD, v_KTD, sinks_H, out_HTD, folded_HT, *extra = ctx.saved_tensors
        inputs = AttentionInputs(q_HTD, k_KTD, v_KTD, sinks_H, ctx.rows, ctx.window, ctx.scale)
        d_out_HTD = _with_dense_heads(d_out_HTD)
        dq_HTD, dk_KTD, dv_KTD = ctx.kernel.backward(
            inputs, d_out_HTD, out_HTD, folded_HT, tuple(extra)
        )
        d_sinks_H = None
        _, _, _, _, need_sinks, *_ = ctx.needs_input_grad
        if need_sinks:
            d_sinks_H = _gradient_of_sinks(d_out_HTD, out_HTD, folded_HT, sinks_H)
        return None, dq_HTD, dk_KTD, dv_KTD, d_sinks_H, None, None, None


def _gradient_of_sinks(
    d_out_HTD: torch.Tensor, out_HTD: torch.Tensor, folded_HT: torch.Tensor, sinks_H: torch.Tensor
) -> torch.Tensor:
    """Return dsink_h = - sum_i exp(sink_h - lse'_hi) delta_hi.

    The sum is taken in pieces, so that no (H, T, D) tensor of products is held.
    """
    probability_HT = (sinks_H.to(folded_HT.dtype).unsqueeze(1) - folded_HT).exp_()
    elements = PIECE_ELEMENTS_CPU if out_HTD.is_cpu else PIECE_ELEMENTS_GPU
    piece_tokens = max(1, elements // (out_HTD.shape[0] * out_HTD.shape[2]))
    total_H = torch.zeros_like(folded_HT[:, 0])
    for d_out, out, probability in zip(
        d_out_HTD.split(piece_tokens, 1),
        out_HTD.split(piece_tokens, 1),
        probability_HT.split(piece_tokens, 1),
        strict=True,
    ):
        total_H -= (probability * (d_out * out.to(folded_HT.dtype)).sum(2)).sum(1)
    return total_H.to(sinks_H.dtype)


def _with_dense_heads(x_HTD: torch.Tensor) -> torch.Tensor:
    """Give the last dimension stride 1.

    torch's flash operator for the CPU (2.13) reads any other stride wrongly, without an error.
    """
    if x_HTD.stride(2) == 1:
        return x_HTD
    return x_HTD.contiguous()

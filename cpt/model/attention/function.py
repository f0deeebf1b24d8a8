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

Shape suffixes: T tokens of all rows (flattened), H query heads, K key/value heads, D head size.
"""

from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cpt.model.attention.rows import PackedRows

PIECE_ELEMENTS = {"cpu": 2**19, "gpu": 2**25}
"""Products that are held at once where the gradient of the sinks is summed: what a cache holds, or
128 MiB.
"""


class Attention(Protocol):
    """Causal attention with sinks over packed rows, differentiable in its four tensors."""

    def __call__(
        self,
        q_HTD: Tensor,
        k_KTD: Tensor,
        v_KTD: Tensor,
        sinks_H: Tensor,
        rows: PackedRows,
        window: int | None,
        scale: float,
    ) -> Tensor:
        """Return the output (H, T, D) in the dtype of q.

        Args:
            q_HTD: Queries; H is a multiple of K and query head h reads key/value head h // (H / K).
            k_KTD: Keys.
            v_KTD: Values.
            sinks_H: One logit per query head, of any floating dtype.
            rows: The documents; a query sees keys of its own document only.
            window: None, or the number of keys a query sees: itself and the `window - 1` before it.
            scale: Factor on q k^T, not applied to the sinks.
        """


class Kernel(Protocol):
    """A flash attention without sinks whose backward takes the output and the log-sum-exp as
    arguments.

    The last dimension of every tensor has stride 1; the others have any stride.
    """

    def forward(
        self,
        q_HTD: Tensor,
        k_KTD: Tensor,
        v_KTD: Tensor,
        rows: PackedRows,
        window: int | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Return out (H, T, D), lse (H, T) and the tensors, if any, that only this kernel's
        backward needs.

        Both are new tensors, which the caller may overwrite. lse is natural, includes the scale,
        and is float32 (float64 for float64). A query that sees no key has out 0 and lse +inf or
        -inf.
        """

    def backward(
        self,
        d_out_HTD: Tensor,
        q_HTD: Tensor,
        k_KTD: Tensor,
        v_KTD: Tensor,
        out_HTD: Tensor,
        lse_HT: Tensor,
        extra: tuple[Tensor, ...],
        rows: PackedRows,
        window: int | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return dq, dk and dv, reading the softmax off `lse_HT` and its correction off `out_HTD`.

        The sums of dk and dv over the query heads of a group are taken in float32 at least.
        """


@dataclass(frozen=True)
class FoldedSinks:
    """The attention that a kernel without sinks becomes by folding the sinks into its
    log-sum-exp.
    """

    kernel: Kernel

    def __call__(
        self,
        q_HTD: Tensor,
        k_KTD: Tensor,
        v_KTD: Tensor,
        sinks_H: Tensor,
        rows: PackedRows,
        window: int | None,
        scale: float,
    ) -> Tensor:
        """Attend, as `Attention` says."""
        out_HTD = SinkAttention.apply(
            q_HTD, k_KTD, v_KTD, sinks_H, self.kernel, rows, window, scale
        )  # type: ignore[no-untyped-call]
        return cast(Tensor, out_HTD)


class SinkAttention(torch.autograd.Function):
    """apply(q_HTD, k_KTD, v_KTD, sinks_H, kernel, rows, window, scale) -> out_HTD."""

    @staticmethod
    def forward(
        ctx: Any,
        q_HTD: Tensor,
        k_KTD: Tensor,
        v_KTD: Tensor,
        sinks_H: Tensor,
        kernel: Kernel,
        rows: PackedRows,
        window: int | None,
        scale: float,
    ) -> Tensor:
        """Run the kernel and fold the sinks into what it returned."""
        q_HTD, k_KTD, v_KTD = (_with_dense_heads(x) for x in (q_HTD, k_KTD, v_KTD))
        out_HTD, lse_HT, extra = kernel.forward(q_HTD, k_KTD, v_KTD, rows, window, scale)
        # FlashAttention 2 on CUDA reports +inf for a query without keys: such a query sees the sink
        # alone.
        lse_HT.masked_fill_(lse_HT == torch.inf, -torch.inf)
        folded_HT = torch.logaddexp(lse_HT, sinks_H.to(lse_HT.dtype).unsqueeze(1))
        out_HTD.mul_((lse_HT - folded_HT).exp_().unsqueeze(2))
        ctx.save_for_backward(q_HTD, k_KTD, v_KTD, sinks_H, out_HTD, folded_HT, *extra)
        ctx.kernel, ctx.rows, ctx.window, ctx.scale = kernel, rows, window, scale
        return out_HTD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_out_HTD: Tensor) -> tuple[Tensor | None, ...]:
        """Run the kernel's backward on the folded output and log-sum-exp, and sum up the sinks'
        gradient.
        """
        q_HTD, k_KTD, v_KTD, sinks_H, out_HTD, folded_HT, *extra = ctx.saved_tensors
        d_out_HTD = _with_dense_heads(d_out_HTD)
        dq_HTD, dk_KTD, dv_KTD = ctx.kernel.backward(
            d_out_HTD,
            q_HTD,
            k_KTD,
            v_KTD,
            out_HTD,
            folded_HT,
            tuple(extra),
            ctx.rows,
            ctx.window,
            ctx.scale,
        )
        d_sinks_H = None
        if ctx.needs_input_grad[3]:
            d_sinks_H = _gradient_of_sinks(d_out_HTD, out_HTD, folded_HT, sinks_H)
        return dq_HTD, dk_KTD, dv_KTD, d_sinks_H, None, None, None, None


def _gradient_of_sinks(
    d_out_HTD: Tensor, out_HTD: Tensor, folded_HT: Tensor, sinks_H: Tensor
) -> Tensor:
    """Return dsink_h = - sum_i exp(sink_h - lse'_hi) delta_hi, summed in pieces to keep no (H, T,
    D) of products.
    """
    probability_HT = (sinks_H.to(folded_HT.dtype).unsqueeze(1) - folded_HT).exp_()
    elements = PIECE_ELEMENTS["cpu" if out_HTD.is_cpu else "gpu"]
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


def _with_dense_heads(x_HTD: Tensor) -> Tensor:
    """Give the last dimension stride 1: torch's CPU flash op (2.13) reads anything else wrongly,
    without an error.
    """
    return x_HTD if x_HTD.stride(2) == 1 else x_HTD.contiguous()

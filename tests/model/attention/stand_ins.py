"""CPU stand-ins for the CUDA kernels: the same signatures, layouts and results, by dense softmax.

A stand-in reads what the real kernel reads (tokens first, int32 offsets, keys to the left and to
the right) and checks what the real kernel checks. It computes the backward from the output and
log-sum-exp that it is handed, as the real kernels do, and returns what they return.

Shape letters: T tokens of all rows (flattened), H query heads, K key/value heads, D head size, L
tokens of a document.
"""

import itertools
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import torch
from torch import Tensor


def _visible(length: int, left: int, right: int) -> Tensor:
    """Return which keys each query of a document sees; -1 is no limit."""
    distance = torch.arange(length)[:, None] - torch.arange(length)
    visible = torch.ones(length, length, dtype=torch.bool)
    if left >= 0:
        visible &= distance <= left
    if right >= 0:
        visible &= -distance <= right
    return visible


def _documents(
    q_THD: Tensor, offsets_q: Tensor, offsets_k: Tensor, max_q: int, max_k: int
) -> Iterator[slice]:
    for offsets in (offsets_q, offsets_k):
        assert offsets.dtype == torch.int32 and offsets.is_contiguous()
        assert int(offsets[0]) == 0 and int(offsets[-1]) == len(q_THD)
    bounds = offsets_q.tolist()
    assert bounds == offsets_k.tolist()
    assert max_q == max_k == max(end - start for start, end in itertools.pairwise(bounds))
    for start, end in itertools.pairwise(bounds):
        yield slice(start, end)


def _heads_first(x_LKD: Tensor, num_heads: int) -> Tensor:
    """Return (H, L, D) with key/value heads repeated, in a dtype that is good for sums."""
    wide = torch.promote_types(x_LKD.dtype, torch.float32)
    return x_LKD.to(wide).transpose(0, 1).repeat_interleave(num_heads // x_LKD.shape[1], 0)


def varlen_forward(
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    offsets: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scale: float,
    window: tuple[int, int],
) -> tuple[Tensor, Tensor]:
    """Return out (T, H, D) in the dtype of q, and lse (H, T) in float32 (float64 for float64)."""
    assert all(x.stride(-1) == 1 and x.ndim == 3 for x in (q_THD, k_TKD, v_TKD))
    num_heads = q_THD.shape[1]
    wide = torch.promote_types(q_THD.dtype, torch.float32)
    out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype)
    lse_HT = torch.empty(num_heads, len(q_THD), dtype=wide)
    for tokens in _documents(q_THD, *offsets, *longest):
        q, k, v = (_heads_first(x[tokens], num_heads) for x in (q_THD, k_TKD, v_TKD))
        hidden = ~_visible(q.shape[1], *window)
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf)
        lse_HT[:, tokens] = scores.logsumexp(-1)
        out_THD[tokens] = (scores.softmax(-1) @ v).transpose(0, 1).to(q_THD.dtype)
    return out_THD, lse_HT


def varlen_backward(
    d_out_THD: Tensor,
    q_THD: Tensor,
    k_TKD: Tensor,
    v_TKD: Tensor,
    out_THD: Tensor,
    lse_HT: Tensor,
    offsets: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scale: float,
    window: tuple[int, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return dq, dk and dv, with the softmax read off `lse_HT` and its correction off `out_THD`."""
    assert lse_HT.is_contiguous() and lse_HT.shape == (q_THD.shape[1], len(q_THD))
    assert out_THD.shape == d_out_THD.shape == q_THD.shape
    num_heads = q_THD.shape[1]
    num_kv_heads = k_TKD.shape[1]
    gradients = [torch.empty(x.shape, dtype=x.dtype) for x in (q_THD, k_TKD, v_TKD)]
    for tokens in _documents(q_THD, *offsets, *longest):
        q, k, v, out, d_out = (
            _heads_first(x[tokens], num_heads) for x in (q_THD, k_TKD, v_TKD, out_THD, d_out_THD)
        )
        hidden = ~_visible(q.shape[1], *window)
        scores = (q @ k.transpose(1, 2) * scale).masked_fill(hidden, -torch.inf)
        probability = (scores - lse_HT[:, tokens, None]).exp()
        delta = (out * d_out).sum(-1, keepdim=True)
        d_scores = probability * (d_out @ v.transpose(1, 2) - delta)
        dq = scale * d_scores @ k
        dk = scale * d_scores.transpose(1, 2) @ q
        dv = probability.transpose(1, 2) @ d_out
        # The CUDA kernels write dk and dv per query head in the dtype of k, then sum the heads of a
        # group in float32.
        grouped = (
            torch.unflatten(x.to(k_TKD.dtype).to(x.dtype), 0, (num_kv_heads, -1)).sum(1)
            for x in (dk, dv)
        )
        for target, gradient in zip(gradients, (dq, *grouped), strict=True):
            target[tokens] = gradient.transpose(0, 1).to(target.dtype)
    return gradients[0], gradients[1], gradients[2]


@contextmanager
def torch_operators(calls: list[dict[str, Any]]) -> Iterator[None]:
    """Give aten's FlashAttention operators a CPU implementation, behind torch's dispatcher."""

    def forward(  # type: ignore[no-untyped-def]
        q,
        k,
        v,
        offsets_q,
        offsets_k,
        max_q,
        max_k,
        dropout,
        is_causal,
        debug,
        *,
        scale=None,
        window_size_left=None,
        window_size_right=None,
        seqused_k=None,
        alibi_slopes=None,
        block_table=None,
        num_splits=None,
    ):
        assert dropout == 0 and is_causal and not debug
        assert seqused_k is alibi_slopes is block_table is num_splits is None
        window = (window_size_left, window_size_right)
        calls.append({"name": "forward", "window": window, "offsets": offsets_q, "longest": max_q})
        out, lse = varlen_forward(q, k, v, (offsets_q, offsets_k), (max_q, max_k), scale, window)
        # float32 is what the real operator returns; the stand-in keeps float64 to be comparable to
        # many digits.
        state = torch.full((2,), 7, dtype=torch.uint64)
        unused = torch.tensor(9, dtype=torch.uint64)
        return out, lse, state, unused, torch.empty(0, dtype=q.dtype)

    def backward(  # type: ignore[no-untyped-def]
        d_out,
        q,
        k,
        v,
        out,
        lse,
        offsets_q,
        offsets_k,
        max_q,
        max_k,
        dropout,
        is_causal,
        rng_state,
        unused,
        *,
        scale=None,
        window_size_left=None,
        window_size_right=None,
    ):
        assert dropout == 0 and is_causal
        assert (
            rng_state.tolist() == [7, 7] and rng_state.dtype == torch.uint64 and unused.item() == 9
        )
        window = (window_size_left, window_size_right)
        calls.append({"name": "backward", "window": window, "offsets": offsets_q, "longest": max_q})
        return varlen_backward(
            d_out, q, k, v, out, lse, (offsets_q, offsets_k), (max_q, max_k), scale, window
        )

    library = torch.library.Library("aten", "IMPL")
    library.impl("_flash_attention_forward", forward, "CPU")
    library.impl("_flash_attention_backward", backward, "CPU")
    try:
        yield
    finally:
        library._destroy()


def flash_attn_2_package(calls: list[dict[str, Any]]) -> dict[str, ModuleType]:
    """Return the modules of a flash-attn 2.8 that runs on the CPU."""

    def _flash_attn_varlen_forward(  # type: ignore[no-untyped-def]
        q,
        k,
        v,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left=-1,
        window_size_right=-1,
        softcap=0.0,
        alibi_slopes=None,
        return_softmax=False,
        block_table=None,
        leftpad_k=None,
        seqused_k=None,
        zero_tensors=False,
    ):
        assert (
            dropout_p == 0
            and causal
            and softcap == 0
            and alibi_slopes is None
            and not return_softmax
        )
        window = (window_size_left, window_size_right)
        calls.append(
            {"name": "forward", "window": window, "offsets": cu_seqlens_q, "longest": max_seqlen_q}
        )
        offsets = (cu_seqlens_q, cu_seqlens_k)
        longest = (max_seqlen_q, max_seqlen_k)
        out, lse = varlen_forward(q, k, v, offsets, longest, softmax_scale, window)
        return out, lse, torch.empty(0, dtype=q.dtype), torch.tensor([7, 7])

    def _flash_attn_varlen_backward(  # type: ignore[no-untyped-def]
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        deterministic,
        rng_state=None,
        zero_tensors=False,
    ):
        assert (
            dropout_p == 0
            and causal
            and softcap == 0
            and alibi_slopes is None
            and deterministic is False
        )
        assert rng_state.tolist() == [7, 7]
        window = (window_size_left, window_size_right)
        calls.append(
            {"name": "backward", "window": window, "offsets": cu_seqlens_q, "longest": max_seqlen_q}
        )
        offsets = (cu_seqlens_q, cu_seqlens_k)
        longest = (max_seqlen_q, max_seqlen_k)
        found = varlen_backward(
            dout, q, k, v, out, softmax_lse, offsets, longest, softmax_scale, window
        )
        for target, gradient in zip((dq, dk, dv), found, strict=True):
            assert target.is_contiguous()
            target.copy_(gradient)
        return torch.empty(q.shape[1], len(q) + 128 * (len(cu_seqlens_q) - 1))

    package = ModuleType("flash_attn")
    interface = ModuleType("flash_attn.flash_attn_interface")
    interface._flash_attn_varlen_forward = _flash_attn_varlen_forward  # type: ignore[attr-defined]
    interface._flash_attn_varlen_backward = _flash_attn_varlen_backward  # type: ignore[attr-defined]
    package.flash_attn_interface = interface  # type: ignore[attr-defined]
    return {"flash_attn": package, "flash_attn.flash_attn_interface": interface}


class _VarlenWithSinks(torch.autograd.Function):
    """The Function of flash-attn-4: out, lse and the backward include the sinks."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, sinks: Tensor, *settings: Any
    ) -> tuple[Tensor, Tensor]:
        out, lse = varlen_forward(q, k, v, *settings)
        folded = torch.logaddexp(lse, sinks.to(lse.dtype)[:, None])
        out = (out * (lse - folded).exp().transpose(0, 1)[:, :, None]).to(q.dtype)
        ctx.save_for_backward(q, k, v, sinks, out, folded)
        ctx.settings = settings
        ctx.set_materialize_grads(False)
        return out, folded

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        d_out, d_lse = gradients
        assert d_out is not None and d_lse is None
        q, k, v, sinks, out, folded = ctx.saved_tensors
        dq, dk, dv = varlen_backward(d_out, q, k, v, out, folded, *ctx.settings)
        delta_HT = (d_out * out.to(folded.dtype)).sum(2).transpose(0, 1)
        d_sinks = -((sinks.to(folded.dtype)[:, None] - folded).exp() * delta_HT).sum(1)
        return dq, dk, dv, d_sinks.to(sinks.dtype), None, None, None, None


def flash_attn_4_package(calls: list[dict[str, Any]]) -> dict[str, ModuleType]:
    """Return the modules of a flash-attn-4 4.0.0b36 that runs on the CPU."""

    def flash_attn_varlen_func(  # type: ignore[no-untyped-def]
        q,
        k,
        v,
        qv=None,
        cu_seqlens_q=None,
        cu_seqlens_k=None,
        max_seqlen_q=None,
        max_seqlen_k=None,
        min_seqlen_k=None,
        seqused_q=None,
        seqused_k=None,
        gather_kv_indices=None,
        page_table=None,
        softmax_scale=None,
        causal=False,
        window_size=(None, None),
        learnable_sink=None,
        softcap=0.0,
        num_splits=1,
        pack_gqa=None,
        deterministic=False,
        score_mod=None,
        score_mod_bwd=None,
        mask_mod=None,
        block_sparse_tensors=None,
        aux_tensors=None,
        aux_scalars=None,
        return_lse=False,
        scheduler_metadata=None,
        seqlen_k_per_split=None,
        disable_scheduler_metadata=False,
        gather_bwd_recompute_p=False,
        gather_bwd_token_chunk=None,
    ):
        assert causal and qv is None and softcap == 0 and not deterministic
        assert learnable_sink.shape == (q.shape[1],)
        assert learnable_sink.dtype in (torch.float16, torch.bfloat16, torch.float32)
        left, right = window_size
        assert right in (None, 0), "causal=True makes it 0"
        window = (-1 if left is None else left, 0)
        calls.append(
            {"name": "forward", "window": window, "offsets": cu_seqlens_q, "longest": max_seqlen_q}
        )
        offsets = (cu_seqlens_q, cu_seqlens_k)
        longest = (max_seqlen_q, max_seqlen_k)
        return _VarlenWithSinks.apply(
            q, k, v, learnable_sink, offsets, longest, softmax_scale, window
        )

    package = ModuleType("flash_attn")
    cute = ModuleType("flash_attn.cute")
    cute.flash_attn_varlen_func = flash_attn_varlen_func  # type: ignore[attr-defined]
    package.cute = cute  # type: ignore[attr-defined]
    return {"flash_attn": package, "flash_attn.cute": cute}


@contextmanager
def installed(modules: dict[str, ModuleType]) -> Iterator[None]:
    """Make modules importable."""
    before = {
        name: module for name, module in sys.modules.items() if name.split(".")[0] == "flash_attn"
    }
    for name in before:
        del sys.modules[name]
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
        sys.modules.update(before)


def flex_attention(  # type: ignore[no-untyped-def]
    query,
    key,
    value,
    score_mod=None,
    block_mask=None,
    scale=None,
    enable_gqa=False,
    return_lse=False,
    kernel_options=None,
    *,
    return_aux=None,
):
    """Compute torch's flex_attention on the CPU, with a backward, from the same blocks and mask."""
    assert score_mod is None and not return_lse and return_aux.lse
    assert enable_gqa or query.shape[1] == key.shape[1]
    num_queries = query.shape[2]
    block = block_mask.BLOCK_SIZE[0]
    index = torch.arange(num_queries)
    visible = block_mask.mask_mod(torch.tensor(0), torch.tensor(0), index[:, None], index)

    def blocks(counts: Tensor, order: Tensor) -> Tensor:
        chosen = torch.zeros(order.shape[2:], dtype=torch.bool)
        for row, count in enumerate(counts[0, 0].tolist()):
            chosen[row, order[0, 0, row, :count].long()] = True
        return chosen.repeat_interleave(block, 0).repeat_interleave(block, 1)[
            :num_queries, :num_queries
        ]

    masked = blocks(block_mask.kv_num_blocks, block_mask.kv_indices)
    whole = blocks(block_mask.full_kv_num_blocks, block_mask.full_kv_indices)
    assert not (masked & whole).any()
    wide = torch.promote_types(query.dtype, torch.float32)
    group = query.shape[1] // key.shape[1]
    k, v = (x.to(wide).repeat_interleave(group, 1) for x in (key, value))
    scores = (query.to(wide) @ k.transpose(2, 3) * scale).masked_fill(
        ~(whole | masked & visible), -torch.inf
    )
    out = (scores.softmax(-1) @ v).to(query.dtype)
    return out, torch.nn.attention.flex_attention.AuxOutput(lse=scores.logsumexp(-1))

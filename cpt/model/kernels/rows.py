"""Rows of experts as operators: gathered, summed for a token, and packed with their weights.

    gather_rows    out_r = rows[index_r]
    combine_rows   out_i = rows[places_i0] + rows[places_i1] + ...       (in fp32)
    pack_rows      payload_r = (token of r, weight of r, 0, 0, ...)

Decisions
    - Each row is read once and each result is written once; nothing is scattered.
    - A gather has a kernel, too: it moves 16 bytes at a time, which index_select does not promise.
    - The rows of a token are added in a fixed order, in fp32 at least, and rounded once.
    - They are plain operators: dispatch.py knows the gradients, which are made of the same three.

Shape letters: N tokens, k experts per token, R = N k rows, M model size.
"""

from __future__ import annotations

import torch

from cpt.model.kernels.availability import fused_kernels_run_on


@torch.library.custom_op("cpt::gather_rows", mutates_args=())
def gather_rows(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """Return the rows at `index`, an int64 vector; rows of one value are a vector."""
    if rows.ndim == 1 or not fused_kernels_run_on(rows):
        return rows.index_select(0, index)
    from cpt.model.kernels import triton_rows

    rows = _with_dense_rows(rows)
    out = rows.new_empty(index.shape[0], rows.shape[1])
    triton_rows.gather(rows, index.contiguous(), out)
    return out


@gather_rows.register_fake
def _gather_rows_shape(rows: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(index.shape[0], *rows.shape[1:])


@torch.library.custom_op("cpt::gather_rows_into", mutates_args=("out_RM",))
def gather_rows_into(rows_RM: torch.Tensor, index_R: torch.Tensor, out_RM: torch.Tensor) -> None:
    """Write the rows at `index_R`, an int64 vector, to `out_RM`, which is contiguous."""
    if not fused_kernels_run_on(rows_RM):
        torch.index_select(rows_RM, 0, index_R, out=out_RM)
        return
    from cpt.model.kernels import triton_rows

    triton_rows.gather(_with_dense_rows(rows_RM), index_R.contiguous(), out_RM)


@gather_rows_into.register_fake
def _gather_rows_into_shape(
    rows_RM: torch.Tensor, index_R: torch.Tensor, out_RM: torch.Tensor
) -> None:
    return None


@torch.library.custom_op("cpt::combine_rows", mutates_args=())
def combine_rows(rows_RM: torch.Tensor, places_Nk: torch.Tensor) -> torch.Tensor:
    """Return (N, M): for each token i the sum of the rows at `places_Nk[i]`, in order.

    Args:
        rows_RM: Rows, which may be columns of a wider tensor.
        places_Nk: int64.
    """
    if not fused_kernels_run_on(rows_RM):
        return _eager_combine(rows_RM, places_Nk)
    from cpt.model.kernels import triton_rows

    rows_RM = _with_dense_rows(rows_RM)
    out_NM = rows_RM.new_empty(places_Nk.shape[0], rows_RM.shape[1])
    triton_rows.combine(rows_RM, places_Nk.contiguous(), out_NM)
    return out_NM


@combine_rows.register_fake
def _combine_rows_shape(rows_RM: torch.Tensor, places_Nk: torch.Tensor) -> torch.Tensor:
    return rows_RM.new_empty(places_Nk.shape[0], rows_RM.shape[1])


@torch.library.custom_op("cpt::pack_rows", mutates_args=())
def pack_rows(
    tokens_NM: torch.Tensor, weights_Nk: torch.Tensor, order_R: torch.Tensor, columns: int
) -> torch.Tensor:
    """Return (R, M + columns): for each row its token, its weight and zeros.

    Args:
        tokens_NM: The tokens.
        weights_Nk: The weight of each of a token's rows, rounded to the dtype of the tokens.
        order_R: Index of each row in the flattened weights, int64.
        columns: Columns beside those of the token, at least one.
    """
    if not fused_kernels_run_on(tokens_NM):
        return _eager_pack(tokens_NM, weights_Nk, order_R, columns)
    from cpt.model.kernels import triton_rows

    payload = tokens_NM.new_empty(order_R.shape[0], tokens_NM.shape[1] + columns)
    triton_rows.pack(tokens_NM.contiguous(), weights_Nk.contiguous(), order_R, payload)
    return payload


@pack_rows.register_fake
def _pack_rows_shape(
    tokens_NM: torch.Tensor, weights_Nk: torch.Tensor, order_R: torch.Tensor, columns: int
) -> torch.Tensor:
    return tokens_NM.new_empty(order_R.shape[0], tokens_NM.shape[1] + columns)


def _with_dense_rows(rows: torch.Tensor) -> torch.Tensor:
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _eager_combine(rows_RM: torch.Tensor, places_Nk: torch.Tensor) -> torch.Tensor:
    first, *others = places_Nk.unbind(1)
    total = rows_RM.index_select(0, first)
    if not others:
        return total
    total = total.to(torch.promote_types(rows_RM.dtype, torch.float32))
    for places in others:
        total += rows_RM.index_select(0, places)
    return total.to(rows_RM.dtype)


def _eager_pack(
    tokens_NM: torch.Tensor, weights_Nk: torch.Tensor, order_R: torch.Tensor, columns: int
) -> torch.Tensor:
    rows_RM = tokens_NM.index_select(0, order_R // weights_Nk.shape[1])
    weights_R = weights_Nk.reshape(-1).index_select(0, order_R)
    beside = rows_RM.new_zeros(rows_RM.shape[0], columns - 1)
    return torch.cat([rows_RM, weights_R[:, None].to(rows_RM.dtype), beside], 1)

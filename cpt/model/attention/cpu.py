"""CPU kernels for sink attention, linear in memory, built on the flash operator inside torch.

Decisions
    A full layer is one causal call per document. Runs of documents too short to be worth a call,
    such as a padding tail in which every position is 0, are taken together as a window layer:
    within a document of n tokens, a window of n is full attention.
    A window layer is one call for all documents. Queries are cut into blocks; a block meets the
    keys that end with it, `block + window` of them, which are overlapping views of one buffer. The
    query heads of a group are folded into the rows of the block, so that the operator works on tall
    tiles and dk and dv come back per key/value head. Short blocks waste less work on keys that no
    query sees, but from 768 rows on the operator takes tiles of 256 rows instead of 64. The first
    wins in the forward, the second in the backward, which multiplies five matrices per
    tile: hence two sizes of block.
    A small additive mask holds the window and the documents; it is the same in all layers and kept
    in PackedRows. The backward of a full layer puts the members of a group into the batch dimension
    and adds up their dk and dv in float32: left to the operator, bf16 gradients are added in bf16
    and are twice as far off.

The operators are internal to torch, but `scaled_dot_product_attention` on the CPU is a wrapper
around them, and it does not hand out the log-sum-exp.

Shape suffixes: T tokens, H query heads, K key/value heads, G query heads per key/value head, D head
size; in window layers N blocks, C tokens of a block, R = C * G rows of a block, U = C + window keys
of a block.
"""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from cpt.model.attention.rows import PackedRows

FORWARD_BLOCK_ROWS = 256
"""Rows of a block, query heads of a group times tokens, in the forward of window layers."""

BACKWARD_BLOCK_ROWS = 768
"""The same in the backward."""

SMALLEST_BLOCK_TOKENS, LARGEST_BLOCK_TOKENS = 32, 128
"""Limits of the tokens that make up these rows."""

SHORT_DOCUMENT_TOKENS = 16
"""Documents up to this length are taken together in full layers, where from here on calls cost more
than they do.
"""


@dataclass(frozen=True, slots=True)
class Span:
    """Neighbouring tokens that are handled by one call."""

    start: int
    end: int
    window: int | None = None
    """None: one document, full causal. Otherwise any documents, and the number of keys that a query
    sees.
    """

    def of(self, x: Tensor) -> Tensor:
        """Return the tokens of this span from a tensor with tokens in dimension 1."""
        return x[:, self.start : self.end]


@dataclass(frozen=True, slots=True)
class CpuKernel:
    """The `cpt.model.attention.function.Kernel` of CPU tensors."""

    def forward(
        self,
        q_HTD: Tensor,
        k_KTD: Tensor,
        v_KTD: Tensor,
        rows: PackedRows,
        window: int | None,
        scale: float,
    ) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Return out, lse and nothing else."""
        parts = []
        for span in spans(rows, window):
            q, k, v = span.of(q_HTD), span.of(k_KTD), span.of(v_KTD)
            if span.window is None:
                parts.append(_causal_forward(q, k, v, scale))
            else:
                parts.append(_Band.of(span, rows, q, k, FORWARD_BLOCK_ROWS).forward(q, k, v, scale))
        out_HTD, lse_HT = (_joined(pieces) for pieces in zip(*parts, strict=True))
        return out_HTD, lse_HT, ()

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
        """Return dq, dk and dv."""
        parts = []
        for span in spans(rows, window):
            d_out, q, k, v, out, lse = (
                span.of(x) for x in (d_out_HTD, q_HTD, k_KTD, v_KTD, out_HTD, lse_HT)
            )
            if span.window is None:
                parts.append(_causal_backward(d_out, q, k, v, out, lse, scale))
            else:
                band = _Band.of(span, rows, q, k, BACKWARD_BLOCK_ROWS)
                parts.append(band.backward(d_out, q, k, v, out, lse, scale))
        dq_HTD, dk_KTD, dv_KTD = (_joined(pieces) for pieces in zip(*parts, strict=True))
        return dq_HTD, dk_KTD, dv_KTD


def block_tokens(block_rows: int, group: int) -> int:
    """Return the tokens of a block of about so many rows, with `group` query heads per key/value
    head.
    """
    return min(max(block_rows // group, SMALLEST_BLOCK_TOKENS), LARGEST_BLOCK_TOKENS)


def spans(rows: PackedRows, window: int | None) -> tuple[Span, ...]:
    """Cut the tokens of `rows` into the calls of a layer with this window."""
    longest_tokens = rows.longest_document_tokens
    if window is not None and window < longest_tokens:
        return (Span(0, rows.num_tokens, window),)
    return rows.derive("spans of full layers", lambda: tuple(_full_spans(rows.bounds)))


def _full_spans(bounds: tuple[int, ...]) -> list[Span]:
    found: list[Span] = []
    for start, end in itertools.pairwise(bounds):
        previous = found[-1] if found else None
        if end - start > SHORT_DOCUMENT_TOKENS:
            found.append(Span(start, end))
        elif previous is None or previous.window is None:
            found.append(Span(start, end, end - start))
        else:
            found[-1] = Span(previous.start, end, max(previous.window, end - start))
    return found


def _joined(pieces: tuple[Tensor, ...]) -> Tensor:
    """Concatenate along tokens; tokens come first in memory, as the layers around attention want
    them.
    """
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat([piece.transpose(0, 1) for piece in pieces]).transpose(0, 1)


def _causal_forward(
    q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out, lse = flash(q_HTD[None], k_KTD[None], v_KTD[None], 0.0, True, scale=scale)
    return out[0], lse[0]


def _causal_backward(
    d_out_HTD: Tensor,
    q_HTD: Tensor,
    k_KTD: Tensor,
    v_KTD: Tensor,
    out_HTD: Tensor,
    lse_HT: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    num_kv_heads = k_KTD.shape[0]
    d_out, q, out, lse = (
        torch.unflatten(x, 0, (num_kv_heads, -1)).transpose(0, 1)
        for x in (d_out_HTD, q_HTD, out_HTD, lse_HT)
    )
    k, v = (x.expand(len(q), -1, -1, -1) for x in (k_KTD, v_KTD))
    flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    dq_GKTD, dk_GKTD, dv_GKTD = flash_backward(d_out, q, k, v, out, lse, 0.0, True, scale=scale)
    dk_KTD, dv_KTD = (x.sum(0, dtype=lse.dtype).to(x.dtype) for x in (dk_GKTD, dv_GKTD))
    return dq_GKTD.transpose(0, 1).flatten(0, 1), dk_KTD, dv_KTD


@dataclass(frozen=True, slots=True)
class _Band:
    """Window attention over the documents of one span, in blocks."""

    block: int
    window: int
    mask_N1RU: Tensor

    @classmethod
    def of(
        cls, span: Span, rows: PackedRows, q_HTD: Tensor, k_KTD: Tensor, block_rows: int
    ) -> "_Band":
        """Take the mask from `rows`, or make it."""
        assert span.window is not None
        window, group = span.window, len(q_HTD) // len(k_KTD)
        block = block_tokens(block_rows, group)

        def build() -> Tensor:
            document_T = rows.document_ids(q_HTD.device)[span.start : span.end]
            return _band_mask(document_T, block, window, group, q_HTD.dtype)

        return cls(
            block,
            window,
            rows.derive(("band", span, block, group, q_HTD.dtype, q_HTD.device), build),
        )

    def forward(
        self, q_HTD: Tensor, k_KTD: Tensor, v_KTD: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        num_tokens, num_kv_heads = q_HTD.shape[1], len(k_KTD)
        q = self._folded(q_HTD, num_kv_heads)
        k, v = self._key_windows(k_KTD), self._key_windows(v_KTD)
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out_NKRD, lse_NKR = flash(q, k, v, 0.0, False, attn_mask=self.mask_N1RU, scale=scale)
        return self._unfolded(out_NKRD, num_tokens), self._unfolded(
            lse_NKR.unsqueeze(3), num_tokens
        ).squeeze(2)

    def backward(
        self,
        d_out_HTD: Tensor,
        q_HTD: Tensor,
        k_KTD: Tensor,
        v_KTD: Tensor,
        out_HTD: Tensor,
        lse_HT: Tensor,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        num_tokens, num_kv_heads = q_HTD.shape[1], len(k_KTD)
        d_out, q, out, lse = (
            self._folded(x, num_kv_heads) for x in (d_out_HTD, q_HTD, out_HTD, lse_HT.unsqueeze(2))
        )
        k, v = self._key_windows(k_KTD), self._key_windows(v_KTD)
        flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq, dk, dv = flash_backward(
            d_out, q, k, v, out, lse.squeeze(3), 0.0, False, attn_mask=self.mask_N1RU, scale=scale
        )
        return (
            self._unfolded(dq, num_tokens),
            self._merged(dk, num_tokens),
            self._merged(dv, num_tokens),
        )

    def _folded(self, x_HTD: Tensor, num_kv_heads: int) -> Tensor:
        """Lay the query heads of a group side by side in the rows of a block: (N, K, R, D).

        The last block is filled up with zeros, whose gradients are zero.
        """
        x_HTD = F.pad(x_HTD, (0, 0, 0, -x_HTD.shape[1] % self.block))
        x_KGNCD = torch.unflatten(
            torch.unflatten(x_HTD, 1, (-1, self.block)), 0, (num_kv_heads, -1)
        )
        return x_KGNCD.permute(2, 0, 3, 1, 4).flatten(2, 3)

    def _unfolded(self, x_NKRD: Tensor, num_tokens: int) -> Tensor:
        """Undo `_folded`: (H, T, D), tokens first in memory."""
        x_NKCGD = torch.unflatten(x_NKRD, 2, (self.block, -1))
        x_THD = x_NKCGD.transpose(1, 2).flatten(2, 3).flatten(0, 1)
        return x_THD[:num_tokens].transpose(0, 1)

    def _key_windows(self, x_KTD: Tensor) -> Tensor:
        """Return the keys that each block meets, (N, K, U, D): views of one buffer that starts with
        `window` zeros.
        """
        buffer_KTD = F.pad(x_KTD, (0, 0, self.window, -x_KTD.shape[1] % self.block))
        return buffer_KTD.unfold(1, self.block + self.window, self.block).permute(1, 0, 3, 2)

    def _merged(self, grad_NKUD: Tensor, num_tokens: int) -> Tensor:
        """Add up the gradients of the key windows where they overlap, (K, T, D), in float32 at
        least.

        Cut into pieces of a block, piece j of key window n covers the same tokens as piece 0 of key
        window n + j.
        """
        num_blocks, num_kv_heads, num_keys, size = grad_NKUD.shape
        num_pieces = -(-num_keys // self.block)
        total_KNCD = grad_NKUD.new_zeros(
            (num_kv_heads, num_blocks + num_pieces - 1, self.block, size),
            dtype=torch.promote_types(grad_NKUD.dtype, torch.float32),
        )
        for j, piece_NKCD in enumerate(grad_NKUD.split(self.block, dim=2)):
            total_KNCD[:, j : j + num_blocks, : piece_NKCD.shape[2]] += piece_NKCD.transpose(0, 1)
        # key window 0 starts `window` tokens before the first one
        return total_KNCD.flatten(1, 2)[:, self.window : self.window + num_tokens].to(
            grad_NKUD.dtype
        )


def _band_mask(
    document_T: Tensor, block: int, window: int, group: int, dtype: torch.dtype
) -> Tensor:
    """Return 0 where a row of a block sees a key of the block and -inf elsewhere, (N, 1, R, U)."""
    document_T = F.pad(document_T, (0, -len(document_T) % block), value=-1)
    query = torch.arange(block, device=document_T.device)[:, None]
    distance_CU = query + window - torch.arange(block + window, device=document_T.device)
    in_window_CU = (distance_CU >= 0) & (distance_CU < window)
    query_document_NC = document_T.view(-1, block)
    key_document_NU = F.pad(document_T, (window, 0), value=-2).unfold(0, block + window, block)
    allowed_NCU = in_window_CU & (query_document_NC[:, :, None] == key_document_NU[:, None, :])
    mask_NCU = torch.zeros(allowed_NCU.shape, dtype=dtype, device=document_T.device)
    return mask_NCU.masked_fill_(~allowed_NCU, -torch.inf).repeat_interleave(group, 1).unsqueeze(1)

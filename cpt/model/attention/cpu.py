"""CPU kernels for sink attention, linear in memory, built on the flash operator inside torch.

Decisions
    - A full layer is one causal call per document. Runs of documents too short to be worth a call,
      such as a padding tail in which every position is 0, are taken together as a window layer:
      within a document of n tokens, a window of n is full attention.
    - A window layer is one call for all documents. Queries are cut into blocks; a block meets the
      keys that end with it, `block + window` of them, which are overlapping views of one buffer.
      The query heads of a group are folded into the rows of the block, so that the operator works
      on tall tiles, and dk and dv come back per key/value head.
    - Short blocks waste less work on keys that no query sees, but from 768 rows on the operator
      takes tiles of 256 rows instead of 64. The first wins in the forward, the second in the
      backward, which multiplies five matrices per tile: hence two sizes of block.
    - A small additive mask holds the window and the documents. It is the same in all layers and
      kept in PackedRows.
    - The backward of a full layer puts the members of a group into the batch dimension and adds up
      their dk and dv in float32. Left to the operator, bf16 gradients are added in bf16 and are
      twice as far off.

The operators are internal to torch, but `scaled_dot_product_attention` on the CPU is a wrapper
around them, and it does not hand out the log-sum-exp.

Shape letters: T tokens, H query heads, K key/value heads, G query heads per key/value head, D head
size; in window layers N blocks, C tokens of a block, R = C * G rows of a block, U = C + window keys
of a block.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from cpt.model.attention.interface import AttentionInputs
from cpt.model.attention.rows import PackedRows

FORWARD_BLOCK_ROWS = 256
"""Rows of a block, query heads of a group times tokens, in the forward of window layers."""

BACKWARD_BLOCK_ROWS = 768
"""Rows of a block in the backward of window layers."""

SMALLEST_BLOCK_TOKENS = 32
LARGEST_BLOCK_TOKENS = 128
"""Limits of the tokens that make up the rows of a block."""

DROPOUT = 0.0

SHORT_DOCUMENT_TOKENS = 16
"""Up to this length, documents of full layers are taken together: a call each would cost more."""


@dataclass(frozen=True, slots=True)
class Span:
    """Neighboring tokens that are handled by one call."""

    start: int
    end: int
    window: int | None = None
    """None for one document with full causal attention; else the keys that a query of any sees."""

    def of(self, x: torch.Tensor) -> torch.Tensor:
        """Return the tokens of this span from a tensor with tokens in dimension 1."""
        return x[:, self.start : self.end]

    def inputs_of(self, inputs: AttentionInputs) -> AttentionInputs:
        """Return inputs whose queries, keys and values are those of this span."""
        return inputs._replace(
            q_HTD=self.of(inputs.q_HTD), k_KTD=self.of(inputs.k_KTD), v_KTD=self.of(inputs.v_KTD)
        )


@dataclass(frozen=True, slots=True)
class CpuKernel:
    """The `cpt.model.attention.interface.Kernel` of CPU tensors."""

    def forward(
        self, inputs: AttentionInputs
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, ...]]:
        """Return out, lse and nothing else."""
        parts = []
        for span in spans(inputs.rows, inputs.window):
            part = span.inputs_of(inputs)
            if span.window is None:
                parts.append(_causal_forward(part))
            else:
                parts.append(_Band.of(span, part, FORWARD_BLOCK_ROWS).forward(part))
        outs, lses = zip(*parts, strict=True)
        return _joined(outs), _joined(lses), ()

    def backward(
        self,
        inputs: AttentionInputs,
        d_out_HTD: torch.Tensor,
        out_HTD: torch.Tensor,
        lse_HT: torch.Tensor,
        extra: tuple[torch.Tensor, ...],
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return dq, dk and dv."""
        parts = []
        for span in spans(inputs.rows, inputs.window):
            part = span.inputs_of(inputs)
            d_out = span.of(d_out_HTD)
            out = span.of(out_HTD)
            lse = span.of(lse_HT)
            if span.window is None:
                parts.append(_causal_backward(part, d_out, out, lse))
            else:
                band = _Band.of(span, part, BACKWARD_BLOCK_ROWS)
                parts.append(band.backward(part, d_out, out, lse))
        dqs, dks, dvs = zip(*parts, strict=True)
        return _joined(dqs), _joined(dks), _joined(dvs)


def block_tokens(block_rows: int, group: int) -> int:
    """Return the tokens of a block of about `block_rows` rows, `group` rows for each token."""
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


def _joined(pieces: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Concatenate along tokens, with tokens first in memory, as the layers around attention are."""
    if len(pieces) == 1:
        return pieces[0]
    return torch.cat([piece.transpose(0, 1) for piece in pieces]).transpose(0, 1)


def _causal_forward(inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    out_1HTD, lse_1HT = flash(
        inputs.q_HTD[None],
        inputs.k_KTD[None],
        inputs.v_KTD[None],
        DROPOUT,
        is_causal=True,
        scale=inputs.scale,
    )
    return out_1HTD[0], lse_1HT[0]


def _causal_backward(
    inputs: AttentionInputs, d_out_HTD: torch.Tensor, out_HTD: torch.Tensor, lse_HT: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    num_kv_heads = len(inputs.k_KTD)
    group = len(inputs.q_HTD) // num_kv_heads

    def members_first(x_HT: torch.Tensor) -> torch.Tensor:
        """Return (G, K, T, ...)."""
        return torch.unflatten(x_HT, 0, (num_kv_heads, group)).transpose(0, 1)

    flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    dq_GKTD, dk_GKTD, dv_GKTD = flash_backward(
        members_first(d_out_HTD),
        members_first(inputs.q_HTD),
        inputs.k_KTD.expand(group, -1, -1, -1),
        inputs.v_KTD.expand(group, -1, -1, -1),
        members_first(out_HTD),
        members_first(lse_HT),
        DROPOUT,
        is_causal=True,
        scale=inputs.scale,
    )
    dk_KTD = dk_GKTD.sum(0, dtype=lse_HT.dtype).to(dk_GKTD.dtype)
    dv_KTD = dv_GKTD.sum(0, dtype=lse_HT.dtype).to(dv_GKTD.dtype)
    return dq_GKTD.transpose(0, 1).flatten(0, 1), dk_KTD, dv_KTD


@dataclass(frozen=True, slots=True)
class _Band:
    """Window attention over the documents of one span, in blocks."""

    block: int
    window: int
    mask_N1RU: torch.Tensor

    @classmethod
    def of(cls, span: Span, inputs: AttentionInputs, block_rows: int) -> _Band:
        """Take the mask from the rows, or make it; the inputs are those of the span."""
        assert span.window is not None
        window = span.window
        q_HTD = inputs.q_HTD
        group = len(q_HTD) // len(inputs.k_KTD)
        block = block_tokens(block_rows, group)

        def build() -> torch.Tensor:
            document_T = inputs.rows.document_ids(q_HTD.device)[span.start : span.end]
            return _band_mask(document_T, block, window, group, q_HTD.dtype)

        key = ("band", span, block, group, q_HTD.dtype, q_HTD.device)
        return cls(block, window, inputs.rows.derive(key, build))

    def forward(self, inputs: AttentionInputs) -> tuple[torch.Tensor, torch.Tensor]:
        num_tokens = inputs.q_HTD.shape[1]
        flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        out_NKRD, lse_NKR = flash(
            self._folded(inputs.q_HTD, len(inputs.k_KTD)),
            self._key_windows(inputs.k_KTD),
            self._key_windows(inputs.v_KTD),
            DROPOUT,
            is_causal=False,
            attn_mask=self.mask_N1RU,
            scale=inputs.scale,
        )
        lse_HT1 = self._unfolded(lse_NKR.unsqueeze(3), num_tokens)
        return self._unfolded(out_NKRD, num_tokens), lse_HT1.squeeze(2)

    def backward(
        self,
        inputs: AttentionInputs,
        d_out_HTD: torch.Tensor,
        out_HTD: torch.Tensor,
        lse_HT: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        num_tokens = inputs.q_HTD.shape[1]
        num_kv_heads = len(inputs.k_KTD)
        flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
        dq_NKRD, dk_NKUD, dv_NKUD = flash_backward(
            self._folded(d_out_HTD, num_kv_heads),
            self._folded(inputs.q_HTD, num_kv_heads),
            self._key_windows(inputs.k_KTD),
            self._key_windows(inputs.v_KTD),
            self._folded(out_HTD, num_kv_heads),
            self._folded(lse_HT.unsqueeze(2), num_kv_heads).squeeze(3),
            DROPOUT,
            is_causal=False,
            attn_mask=self.mask_N1RU,
            scale=inputs.scale,
        )
        dq_HTD = self._unfolded(dq_NKRD, num_tokens)
        return dq_HTD, self._merged(dk_NKUD, num_tokens), self._merged(dv_NKUD, num_tokens)

    def _folded(self, x_HTD: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
        """Lay the query heads of a group side by side in the rows of a block: (N, K, R, D).

        The last block is filled up with zeros, whose gradients are zero.
        """
        x_HTD = F.pad(x_HTD, (0, 0, 0, -x_HTD.shape[1] % self.block))
        x_KGNCD = torch.unflatten(
            torch.unflatten(x_HTD, 1, (-1, self.block)), 0, (num_kv_heads, -1)
        )
        return x_KGNCD.permute(2, 0, 3, 1, 4).flatten(2, 3)

    def _unfolded(self, x_NKRD: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Undo `_folded`: (H, T, D), tokens first in memory."""
        x_NKCGD = torch.unflatten(x_NKRD, 2, (self.block, -1))
        x_THD = x_NKCGD.transpose(1, 2).flatten(2, 3).flatten(0, 1)
        return x_THD[:num_tokens].transpose(0, 1)

    def _key_windows(self, x_KTD: torch.Tensor) -> torch.Tensor:
        """Return the keys that each block meets, (N, K, U, D).

        They are views of one buffer that starts with `window` zeros.
        """
        buffer_KTD = F.pad(x_KTD, (0, 0, self.window, -x_KTD.shape[1] % self.block))
        return buffer_KTD.unfold(1, self.block + self.window, self.block).permute(1, 0, 3, 2)

    def _merged(self, grad_NKUD: torch.Tensor, num_tokens: int) -> torch.Tensor:
        """Add up gradients of the key windows where they overlap, in float32 at least: (K, T, D).

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
        # Key window 0 starts `window` tokens before the first one.
        total_KTD = total_KNCD.flatten(1, 2)[:, self.window : self.window + num_tokens]
        return total_KTD.to(grad_NKUD.dtype)


def _band_mask(
    document_T: torch.Tensor, block: int, window: int, group: int, dtype: torch.dtype
) -> torch.Tensor:
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

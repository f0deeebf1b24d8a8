"""The two kinds of forward pass that decoding consists of.

A `PromptPass` reads prompts, packed into one row as documents are in training, with the kernel of
training, and keeps their keys and values. A `TokenPass` reads one more token of each row. Both give
the logits of the tokens that come next.

Shape letters: B rows of the cache, N tokens of all prompts, n of these that are kept, P prompts, H
query heads, K key/value heads, U slots, D head size, V vocabulary.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from cpt.model.attention import Attention, PackedRows
from cpt.model.attention.placement import place_documents
from cpt.model.decoding.attention import decoding_attention
from cpt.model.decoding.cache import KeyValueCache
from cpt.storage.transfer import to_device


class _Kept(NamedTuple):
    """The tokens of prompts whose keys one kind of layer keeps, and where."""

    tokens_n: torch.Tensor
    rows_n: torch.Tensor
    slots_n: torch.Tensor


class PromptPass:
    """Prompts that are read at once; their keys and values go into rows of the cache."""

    def __init__(
        self, cache: KeyValueCache, prompts: Sequence[Sequence[int]], first_row: int | None
    ) -> None:
        """Pack the prompts.

        Args:
            cache: Has room for the longest prompt.
            prompts: Tokens, at least one each.
            first_row: The row of the cache for the first prompt; the next ones follow. None keeps
                nothing: a rank without a prompt reads a filler, because all ranks run each pass.
        """
        self._cache = cache
        self._first_row = first_row
        self._lengths = [len(prompt) for prompt in prompts]
        self._kept: dict[int | None, _Kept] = {}
        bounds = [0, *itertools.accumulate(self._lengths)]
        device = cache.device
        self.packed_rows = PackedRows(batch_size=1, seq_len=bounds[-1], bounds=tuple(bounds))
        """Each prompt is a document."""
        place_documents(self.packed_rows, device)
        tokens = torch.tensor([list(itertools.chain.from_iterable(prompts))])
        positions = torch.cat([torch.arange(length) for length in self._lengths])
        self.input_ids = to_device(tokens, device)
        """(1, N) tokens."""
        self.position_ids = to_device(positions.unsqueeze(0), device)
        """(1, N) positions within each prompt."""
        self.logits_at = to_device(torch.tensor(bounds[1:]) - 1, device)
        """(P,) the last token of each prompt."""

    def keep(self, layer: int, k_1KND: torch.Tensor, v_1KND: torch.Tensor) -> None:
        """Put the keys and values of a layer into the cache."""
        if self._first_row is None:
            return
        window = self._cache.windows[layer]
        if window not in self._kept:
            self._kept[window] = self._choose(window, self._first_row)
        kept = self._kept[window]
        k_nKD = k_1KND[0].transpose(0, 1)[kept.tokens_n]
        v_nKD = v_1KND[0].transpose(0, 1)[kept.tokens_n]
        self._cache.write(layer, kept.rows_n, kept.slots_n, k_nKD, v_nKD)

    def _choose(self, window: int | None, first_row: int) -> _Kept:
        """Return the tokens that a layer of this window keeps: the last ones of each prompt."""
        tokens = []
        rows = []
        slots = []
        start = 0
        for number, length in enumerate(self._lengths):
            kept = length if window is None else min(length, window)
            positions = torch.arange(length - kept, length)
            tokens.append(start + positions)
            rows.append(torch.full((kept,), first_row + number))
            slots.append(positions if window is None else positions % window)
            start += length
        device = self._cache.device
        return _Kept(
            to_device(torch.cat(tokens), device),
            to_device(torch.cat(rows), device),
            to_device(torch.cat(slots), device),
        )


class _Slots(NamedTuple):
    """The slots of one kind of layer in a pass of one token a row."""

    written_B: torch.Tensor
    """Slot of each row's token."""
    allowed_BU: torch.Tensor
    """Slots that a row's token sees."""


class TokenPass:
    """One more token of each of the first rows of the cache."""

    packed_rows = None
    logits_at = None

    def __init__(
        self,
        cache: KeyValueCache,
        tokens_B: torch.Tensor,
        positions_B: torch.Tensor,
        longest_tokens: int,
    ) -> None:
        """Take the tokens.

        Args:
            cache: Has room for `longest_tokens`.
            tokens_B: The last token of each row, on the device.
            positions_B: Its position in its text, on the device.
            longest_tokens: Tokens of the longest row, this one included; the host knows them, and
                must not wait for the device to learn them.
        """
        self._cache = cache
        self._positions_B = positions_B
        self._longest_tokens = longest_tokens
        self._rows_B = torch.arange(len(positions_B), device=positions_B.device)
        self._slots: dict[int | None, _Slots] = {}
        self.input_ids = tokens_B.unsqueeze(1)
        """(B, 1) tokens."""
        self.position_ids = positions_B.unsqueeze(1)
        """(B, 1) positions."""

    def attend(
        self,
        layer: int,
        q_BH1D: torch.Tensor,
        k_BK1D: torch.Tensor,
        v_BK1D: torch.Tensor,
        sinks_H: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Add the key and value of each row to a layer's cache, and attend to all of its row.

        Returns:
            (B, 1, H, D).
        """
        window = self._cache.windows[layer]
        if window not in self._slots:
            self._slots[window] = self._find_slots(window)
        slots = self._slots[window]
        self._cache.write(layer, self._rows_B, slots.written_B, k_BK1D[:, :, 0], v_BK1D[:, :, 0])
        num_rows, num_slots = slots.allowed_BU.shape
        k_BKUD, v_BKUD = self._cache.read(layer, num_rows, num_slots)
        out_BHD = decoding_attention(
            q_BH1D[:, :, 0], k_BKUD, v_BKUD, sinks_H, slots.allowed_BU, scale
        )
        return out_BHD.unsqueeze(1)

    def _find_slots(self, window: int | None) -> _Slots:
        """Return the slots of layers of this window.

        A row at position p has filled slots 0 to p. In a ring that is full, these are all, and they
        hold the positions that the window lets it see.
        """
        positions_B = self._positions_B
        num_slots = self._longest_tokens
        written_B = positions_B
        if window is not None:
            num_slots = min(num_slots, window)
            written_B = positions_B % window
        slots_U = torch.arange(num_slots, device=positions_B.device)
        return _Slots(written_B, slots_U <= positions_B.unsqueeze(1))


def next_token_logits(
    model: Callable[..., torch.Tensor], cache_pass: PromptPass | TokenPass, kernel: Attention
) -> torch.Tensor:
    """Run a pass and return the fp32 logits of the tokens that come next, on the device.

    The last product is taken in the dtype of the model, and its result made fp32 before anything
    is chosen or drawn, as `generate` of transformers does.  In bf16 that rounds logits to 8 bits:
    tokens that are nearly as likely as each other become equal, and the first of them is chosen.

    Args:
        model: A `GptOssForCPT`, or an engine around one, in evaluation mode.
        cache_pass: The tokens to read.
        kernel: Computes the attention of prompts.

    Returns:
        (P, V) or (B, V): one row for each prompt or row of the pass.
    """
    logits = model(
        input_ids=cache_pass.input_ids,
        position_ids=cache_pass.position_ids,
        logits_at=cache_pass.logits_at,
        packed_rows=cache_pass.packed_rows,
        kernel=kernel,
        cache_pass=cache_pass,
    )
    return logits.flatten(0, -2).float()

"""Logits in tiles: some words of the vocabulary at a time, for all tokens, in one piece of memory.

Shape letters: N tokens, M model size, V vocabulary, v one tile of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch

CPU_TILE_BYTES = 4 * 2**20
"""Memory for one tile in the dtype of the sums on a CPU: what fits the cache of a core."""

GPU_TILE_WORDS = 16_384
"""Words of a tile on a GPU.

The gradient of the hidden states, 4 bytes, is read and written once per tile.  With a fixed number
of words that traffic grows like the tokens, and is a sixth of what a tile itself takes.
"""

GPU_TILE_BYTES = 2**30
"""Largest tile on a GPU; reached at 32,768 tokens in bf16."""

SMALLEST_TILE_WORDS = 256
"""Least words of a tile: thinner matrix products are not worth the memory they save."""

TILE_WORDS_MULTIPLE = 128
"""What divides the words of a tile on a GPU, so that products and kernels meet aligned rows."""


def words_of_a_tile(device_type: str, num_tokens: int, itemsize: int) -> int:
    """Return the words of a tile; the last one of a vocabulary may have fewer.

    Args:
        device_type: Type of the device that computes.
        num_tokens: Tokens of a tile.
        itemsize: Bytes of a logit in the dtype of the model.
    """
    if device_type == "cpu":
        sum_itemsize = max(itemsize, 4)
        return max(SMALLEST_TILE_WORDS, CPU_TILE_BYTES // (max(1, num_tokens) * sum_itemsize))
    affordable = GPU_TILE_BYTES // (max(1, num_tokens) * itemsize)
    affordable -= affordable % TILE_WORDS_MULTIPLE
    return max(SMALLEST_TILE_WORDS, min(GPU_TILE_WORDS, affordable))


def work_bytes(device_type: str, num_tokens: int, itemsize: int) -> int:
    """Return the memory for logits and their gradient in the backward, for fp32 or narrower.

    The gradient takes the place of the logits, and the next tile that of the one before.  A CPU
    computes it in an fp32 copy, a GPU's kernel in registers.
    """
    logits = num_tokens * words_of_a_tile(device_type, num_tokens, itemsize)
    if device_type == "cpu" and itemsize < 4:
        return logits * (itemsize + 4)
    return logits * itemsize


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitTile:
    """The logits of all tokens for some consecutive words."""

    first: int
    """Number of the first word."""
    weight_vM: torch.Tensor
    """Output weights of the words, a part of the whole."""
    logits_Nv: torch.Tensor
    """Logits in the dtype of the model; may be overwritten, and the next tile overwrites them."""
    memory: torch.Tensor
    """(at least N v + 1,) where the logits lie, row after row, from the start.

    The last element is never a logit: whatever has no place in the tile is written there.
    """

    @property
    def words(self) -> int:
        """Number of words."""
        return self.weight_vM.shape[0]


def tile_words(hidden_NM: torch.Tensor, weight_VM: torch.Tensor) -> int:
    """Return the words of every tile but the last of these hidden states and weights."""
    words = words_of_a_tile(hidden_NM.device.type, hidden_NM.shape[0], hidden_NM.dtype.itemsize)
    return min(words, weight_VM.shape[0])


def logit_tiles(hidden_NM: torch.Tensor, weight_VM: torch.Tensor) -> Iterator[LogitTile]:
    """Yield the logits tile by tile; only the last yielded tile is valid. Needs no_grad."""
    num_tokens = hidden_NM.shape[0]
    vocabulary = weight_VM.shape[0]
    words = tile_words(hidden_NM, weight_VM)
    memory = hidden_NM.new_empty(num_tokens * words + 1)
    for first in range(0, vocabulary, words):
        weight_vM = weight_VM[first : first + words]
        size = num_tokens * weight_vM.shape[0]
        logits_Nv = memory[:size].view(num_tokens, weight_vM.shape[0])
        torch.mm(hidden_NM, weight_vM.T, out=logits_Nv)
        yield LogitTile(first=first, weight_vM=weight_vM, logits_Nv=logits_Nv, memory=memory)

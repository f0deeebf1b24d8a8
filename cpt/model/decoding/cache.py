"""Keys and values of the texts that are being decoded, by layer, row and position.

Decisions
    - A layer that sees everything has a slot for each position, and grows. A window layer has a
      ring of as many slots as a query sees: position p lies in slot p % window, so the key that
      falls out of the window is the one that is overwritten.
    - Keys are stored rotated, so their order does not matter to attention.
    - Rows are filled from the front: the first n rows are in use. A row that ends is replaced by
      the last one, so a pass never computes rows that are done.

Shape letters: R rows of the cache, K key/value heads, U slots, D head size, n keys that are
written.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import GptOssConfig

from cpt.storage.transfer import to_device

GROWTH = 1.5
"""Least factor by which a cache grows.  It is copied whenever it grows, so texts of n tokens cost
at most about 2 n copied positions; growing by the 8 tokens that are needed would cost n^2 / 16.
"""


def cache_bytes(config: GptOssConfig, num_tokens: int, dtype: torch.dtype) -> int:
    """Return the bytes that a row of so many tokens takes in the caches of all layers.

    With the 8 key/value heads of 64 of gpt-oss in bf16 this is 2 KiB per layer and token: for 20b
    (120b) 24 (36) KiB per token in the 12 (18) full layers, and 3 (4.5) MiB per row in the window
    layers.
    """
    slots = 0
    for window in layer_windows(config):
        slots += num_tokens if window is None else window
    numel = 2 * slots * config.num_key_value_heads * config.head_dim
    return numel * dtype.itemsize


def layer_windows(config: GptOssConfig) -> list[int | None]:
    """Return the number of keys that a query sees in each layer; None for no limit."""
    windows: list[int | None] = []
    for kind in config.layer_types or ():
        windows.append(config.sliding_window if kind == "sliding_attention" else None)
    return windows


class KeyValueCache:
    """The cache of all layers for a number of rows."""

    def __init__(
        self,
        config: GptOssConfig,
        num_rows: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        longest_tokens: int,
    ) -> None:
        """Allocate the rings of the window layers; `reserve` allocates the rest.

        Args:
            config: The model's.
            num_rows: Rows that are decoded at once, at most.
            dtype: Type of keys and values.
            device: Where the model computes.
            longest_tokens: Positions beyond which no text goes; more are allocated on demand only.
        """
        self.device = device
        self._longest_tokens = longest_tokens
        self.num_rows = num_rows
        self.windows = layer_windows(config)
        """Keys that a query sees in each layer; None for no limit."""
        self.capacity_tokens = 0
        """Positions that a row has room for."""
        self._keys_RKUD: list[torch.Tensor] = []
        self._values_RKUD: list[torch.Tensor] = []
        for window in self.windows:
            shape = (num_rows, config.num_key_value_heads, window or 0, config.head_dim)
            # Zeros, because a slot without a key has probability 0, and 0 times garbage may be NaN.
            self._keys_RKUD.append(torch.zeros(shape, dtype=dtype, device=device))
            self._values_RKUD.append(torch.zeros(shape, dtype=dtype, device=device))

    def reserve(self, num_tokens: int) -> None:
        """Make room for so many positions of each row.

        More than asked for is allocated when the cache grows, but not more than the longest text
        takes: the memory of that is what `num_rows` was chosen for.
        """
        if num_tokens <= self.capacity_tokens:
            return
        roomy = min(int(GROWTH * self.capacity_tokens), self._longest_tokens)
        self.capacity_tokens = max(num_tokens, roomy)
        for layer, window in enumerate(self.windows):
            if window is None:
                self._keys_RKUD[layer] = self._grown(self._keys_RKUD[layer])
                self._values_RKUD[layer] = self._grown(self._values_RKUD[layer])

    def _grown(self, old_RKUD: torch.Tensor) -> torch.Tensor:
        rows, heads, num_slots, head_dim = old_RKUD.shape
        new_RKUD = old_RKUD.new_zeros(rows, heads, self.capacity_tokens, head_dim)
        new_RKUD[:, :, :num_slots] = old_RKUD
        return new_RKUD

    def write(
        self,
        layer: int,
        rows_n: torch.Tensor,
        slots_n: torch.Tensor,
        k_nKD: torch.Tensor,
        v_nKD: torch.Tensor,
    ) -> None:
        """Put keys and values into slots of rows; no slot is named twice."""
        self._keys_RKUD[layer][rows_n, :, slots_n] = k_nKD
        self._values_RKUD[layer][rows_n, :, slots_n] = v_nKD

    def read(self, layer: int, num_rows: int, num_slots: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the first slots of the first rows, keys and values, as views."""
        keys_RKUD = self._keys_RKUD[layer][:num_rows, :, :num_slots]
        values_RKUD = self._values_RKUD[layer][:num_rows, :, :num_slots]
        return keys_RKUD, values_RKUD

    def move(self, sources: Sequence[int], targets: Sequence[int]) -> None:
        """Copy rows over others, whose text has ended."""
        if not sources:
            return
        sources_n = to_device(torch.tensor(sources), self.device)
        targets_n = to_device(torch.tensor(targets), self.device)
        for tensors in (self._keys_RKUD, self._values_RKUD):
            for tensor_RKUD in tensors:
                tensor_RKUD[targets_n] = tensor_RKUD[sources_n]

"""Random weights that depend on seed, name and position alone, not on the layout or the dtype.

Each flattened global tensor is cut into blocks, and each block has a generator of its own. A rank
draws the blocks that its part touches, so no rank ever holds a whole tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch

BLOCK_NUMEL = 2**18


class RandomWeights:
    """A `WeightSource` that initializes as Hugging Face's GptOssPreTrainedModel does."""

    def __init__(self, seed: int, initializer_range: float) -> None:
        self._seed = seed
        self._std = initializer_range

    def pieces(self, name: str, start: int, stop: int) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the values block by block; see `cpt.model.weights.source.WeightSource`."""
        for block in range(start // BLOCK_NUMEL, -(-stop // BLOCK_NUMEL)):
            first = block * BLOCK_NUMEL
            low = max(start, first)
            high = min(stop, first + BLOCK_NUMEL)
            if name.endswith("norm.weight"):
                yield low, torch.ones(high - low)
            elif name.endswith("bias") and not name.endswith("router.bias"):
                yield low, torch.zeros(high - low)
            else:
                yield low, self._normal(f"{name}:{block}")[low - first : high - first]

    def _normal(self, key: str) -> torch.Tensor:
        digest = hashlib.sha256(f"{self._seed}:{key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        return torch.randn(BLOCK_NUMEL, generator=generator) * self._std

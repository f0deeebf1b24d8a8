"""Invented documents: sources of `format: mock`, for speed tests without data."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import xxhash

from data_pipeline.config.source_config import SourceConfig
from data_pipeline.store.hashing import splitmix64
from data_pipeline.text.tokenizer import NUM_TEXT_TOKENS, Tokens


def invent_documents(source: SourceConfig, start: int, stop: int) -> Iterator[Tokens]:
    """Yield random text tokens for the documents [start, stop), without END_OF_TEXT.

    They follow from the name of the source and the number of the document. Lengths are spread
    evenly from half to one and a half times the mean.
    """
    assert source.mean_tokens is not None, "load_mix refuses a mock source without mean_tokens"
    key = np.uint64(xxhash.xxh3_64_intdigest(source.name.encode()))
    numbers = splitmix64(np.arange(start, stop, dtype=np.uint64) ^ key)
    lengths = source.mean_tokens // 2 + numbers % np.uint64(source.mean_tokens + 1)
    for number, length in zip(numbers, lengths.tolist(), strict=True):
        scattered = splitmix64(np.arange(length, dtype=np.uint64) + number)
        yield (scattered % np.uint64(NUM_TEXT_TOKENS)).astype(np.uint32)

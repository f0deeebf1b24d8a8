"""A vocabulary that a small model can learn on two CPU cores: the first merges of o200k.

o200k is a byte-pair encoding whose merges are ordered, so its first N are a lossless encoding of
their own.  `shrink` puts it in the tokenizer's place.  It must be called before any other module of
the data pipeline is imported, because they take the tokenizer's constants by name.  Bits per byte
do not depend on the vocabulary.
"""

from __future__ import annotations

import functools

import tiktoken

NUM_MERGES = 8192
VOCAB_SIZE = NUM_MERGES + 64
"""The merges, and room for control tokens."""


def shrink() -> None:
    """Put the small vocabulary in the place of o200k_harmony, in this process."""
    from data_pipeline.text import tokenizer

    whole = tokenizer.encoding()
    ranks = {token: rank for token, rank in whole._mergeable_ranks.items() if rank < NUM_MERGES}

    @functools.cache
    def encoding() -> tiktoken.Encoding:
        return tiktoken.Encoding(
            f"o200k-first-{NUM_MERGES}",
            pat_str=whole._pat_str,
            mergeable_ranks=ranks,
            special_tokens={"<|endoftext|>": NUM_MERGES},
        )

    tokenizer.encoding = encoding
    tokenizer.NAME = f"o200k-first-{NUM_MERGES}"
    tokenizer.END_OF_TEXT = NUM_MERGES
    tokenizer.NUM_TEXT_TOKENS = NUM_MERGES
    tokenizer.VOCAB_SIZE = VOCAB_SIZE

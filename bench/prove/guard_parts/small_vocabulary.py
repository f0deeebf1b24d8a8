"""A vocabulary that a small model can learn on two CPU cores: the first merges of o200k.

o200k is a byte-pair encoding whose merges are ordered, so its first N are a lossless encoding of
their own.  `shrink` puts it in the tokenizer's place, with the control tokens of Harmony behind it,
and gives conversations a short system message, which would otherwise be most of their tokens.  It
must be called before any other module of the data pipeline is imported, because they take these
constants by name.  Bits per byte do not depend on the vocabulary.
"""

from __future__ import annotations

import functools
import os

import tiktoken

MERGES_VARIABLE = "GUARD_PROOF_MERGES"
NUM_MERGES = int(os.environ.get(MERGES_VARIABLE, "8192"))
"""Merges of the vocabulary.  A script sets the variable before it imports this module, and the
processes that it starts inherit it."""
CONTROL_TOKENS = (
    "<|startoftext|>",
    "<|endoftext|>",
    "<|return|>",
    "<|constrain|>",
    "<|channel|>",
    "<|start|>",
    "<|end|>",
    "<|message|>",
    "<|call|>",
    "<|endofprompt|>",
)
END_OF_TEXT = NUM_MERGES + 1
VOCAB_SIZE = NUM_MERGES + 64
"""The merges, the control tokens, and room."""
SYSTEM_TEXT = "system"
"""Text of the short system message."""


def shrink() -> None:
    """Put the small vocabulary in the place of o200k_harmony, in this process."""
    from data_pipeline.text import tokenizer

    ids = {name: NUM_MERGES + at for at, name in enumerate(CONTROL_TOKENS)}
    whole = tokenizer.encoding()
    ranks = {token: rank for token, rank in whole._mergeable_ranks.items() if rank < NUM_MERGES}

    @functools.cache
    def encoding() -> tiktoken.Encoding:
        return tiktoken.Encoding(
            f"o200k-first-{NUM_MERGES}",
            pat_str=whole._pat_str,
            mergeable_ranks=ranks,
            special_tokens=ids,
        )

    tokenizer.encoding = encoding
    tokenizer.NAME = f"o200k-first-{NUM_MERGES}"
    tokenizer.END_OF_TEXT = END_OF_TEXT
    tokenizer.NUM_TEXT_TOKENS = NUM_MERGES
    tokenizer.VOCAB_SIZE = VOCAB_SIZE
    _shrink_harmony(ids)


def _shrink_harmony(ids: dict[str, int]) -> None:
    """Give the conversation format the ids of the small vocabulary, and a short system message."""
    from data_pipeline.text import harmony

    harmony.RETURN = ids["<|return|>"]
    harmony.CHANNEL = ids["<|channel|>"]
    harmony.START = ids["<|start|>"]
    harmony.END = ids["<|end|>"]
    harmony.MESSAGE = ids["<|message|>"]
    harmony.CALL = ids["<|call|>"]
    harmony.STOP_IDS = (harmony.RETURN, END_OF_TEXT, harmony.CALL)
    harmony.system_message = lambda *_, **__: harmony._message("system", SYSTEM_TEXT)

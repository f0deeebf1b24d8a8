"""Decoding with a key/value cache: many texts at once, one token of each in a pass.

    cache.py      KeyValueCache            keys and values of every layer, by row and position
    passes.py     PromptPass               reads prompts and fills the cache
                  TokenPass                reads one more token of each row
                  next_token_logits(...)   runs the model on either
    attention.py  decoding_attention       one query a row against the keys of the cache

Ranks that share rows in training decode rows of their own here: nothing is exchanged around
attention. Under ZeRO-3 and expert parallelism all ranks still have to run every pass together.
"""

from __future__ import annotations

from cpt.model.decoding.attention import decoding_attention
from cpt.model.decoding.cache import KeyValueCache, cache_bytes
from cpt.model.decoding.passes import PromptPass, TokenPass, next_token_logits

__all__ = [
    "KeyValueCache",
    "PromptPass",
    "TokenPass",
    "cache_bytes",
    "decoding_attention",
    "next_token_logits",
]

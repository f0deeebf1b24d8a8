"""Floating-point operations of one token of gpt-oss, forward and backward.

    6 * (parameters that a token multiplies with) + 3 * (attention, forward)

Without gradients of the weights, below adapters or under `train.freeze`, it is 4 in place of 6; the
adapters' own products are few and left out.

A product with a weight costs 2 operations per parameter forward and 4 backward.  Attention costs 4
per key, query head and head size forward (scores and values): a full layer sees seq_len / 2 keys on
average, a window layer `window`. The embedding is a look-up and costs nothing; recomputation is not
counted here.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import GptOssConfig

from cpt.config.window import window_tokens
from cpt.planning.trained_weights import ALL, TrainedShares


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenFlops:
    """Operations per token, forward and backward."""

    dense: float
    """Products with weights that every token meets, including the output head."""
    experts: float
    """Products with the weights of the chosen experts."""
    attention: float
    """Attention scores and weighted values."""
    window_attention: float
    """The part of `attention` in window layers."""

    @property
    def total(self) -> float:
        """All operations of one token."""
        return self.dense + self.experts + self.attention


def flops_per_token(model: GptOssConfig, seq_len: int, trained: TrainedShares = ALL) -> TokenFlops:
    """Return the operations of one token in rows that hold one document of `seq_len` tokens.

    Shorter documents cost less.

    Args:
        model: The architecture.
        seq_len: Tokens of a row.
        trained: The weights that have gradients.
    """
    hidden = model.hidden_size
    layers = model.num_hidden_layers
    heads = 2 * model.num_attention_heads + 2 * model.num_key_value_heads
    projections = hidden * model.head_dim * heads
    router = hidden * model.num_local_experts
    expert = 3 * hidden * model.intermediate_size
    layer_types = list(model.layer_types or ())
    # forward and backward; scores and weighted values
    per_key = 3 * 4.0 * model.num_attention_heads * model.head_dim
    windows = layer_types.count("sliding_attention") * min(window_tokens(model), seq_len / 2)
    full = layer_types.count("full_attention") * seq_len / 2
    return TokenFlops(
        dense=layers * (_per_weight(trained.attention) * projections)
        + layers * (_per_weight(trained.router) * router)
        + _per_weight(trained.head) * hidden * model.vocab_size,
        experts=_per_weight(trained.experts) * layers * model.num_experts_per_tok * expert,
        attention=per_key * (full + windows),
        window_attention=per_key * windows,
    )


def _per_weight(share: float) -> float:
    """Return the operations of a weight, of which a share has gradients."""
    return 4.0 + 2.0 * share

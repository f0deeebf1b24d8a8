"""A layer of gpt-oss with its elementwise steps fused: additions, norms and rotation.

The modules take over the parameters of the Hugging Face modules that they replace, under the same
names. Each owns its parameters, because the engine's hooks gather those of the module that runs.

Source of the maths: GptOssDecoderLayer, GptOssAttention and GptOssRMSNorm in transformers,
models/gpt_oss/modeling_gpt_oss.py, the same in 5.17 and in 5.23.

Shape letters: B rows, S local tokens of a row, M model size, H query heads, K key/value heads, D
head size, d half of it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import (
    ALL_ATTENTION_FUNCTIONS,
    GptOssAttention,
    GptOssDecoderLayer,
    GptOssRMSNorm,
)

from cpt.model.decoding import PromptPass, TokenPass
from cpt.model.experts.layer import ExpertParallelMLP
from cpt.model.kernels.rms_norm import add_rms_norm, rms_norm
from cpt.model.kernels.rope import rotate


class RMSNorm(GptOssRMSNorm):  # type: ignore[misc]
    """The norm after the last layer."""

    def __init__(self, source: GptOssRMSNorm) -> None:
        nn.Module.__init__(self)
        self.weight = source.weight
        self.variance_epsilon = source.variance_epsilon

    def forward(self, hidden_BSM: torch.Tensor) -> torch.Tensor:
        """Return the normed hidden states."""
        _, normed_BSM = rms_norm(hidden_BSM, self.weight, self.variance_epsilon)
        return normed_BSM


class InputNorm(RMSNorm):
    """The norm before attention."""

    def forward(  # type: ignore[override]
        self, hidden_BSM: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the hidden states, which go around attention, and the normed ones."""
        return rms_norm(hidden_BSM, self.weight, self.variance_epsilon)


class AddNorm(RMSNorm):
    """The addition after attention, and the norm before the experts."""

    def forward(  # type: ignore[override]
        self, residual_BSM: torch.Tensor, attended_BSM: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the sum, which goes around the experts, and the normed sum."""
        return add_rms_norm(residual_BSM, attended_BSM, self.weight, self.variance_epsilon)


class RotaryAttention(GptOssAttention):  # type: ignore[misc]
    """A drop-in for GptOssAttention, for packed rows, and for decoding with a cache of our own."""

    def __init__(self, source: GptOssAttention) -> None:
        with torch.device("meta"):
            super().__init__(source.config, source.layer_idx)
        self.sinks = source.sinks
        self.q_proj = source.q_proj
        self.k_proj = source.k_proj
        self.v_proj = source.v_proj
        self.o_proj = source.o_proj

    def forward(  # type: ignore[override]
        self,
        hidden_states: torch.Tensor,
        position_embeddings: tuple[torch.Tensor, torch.Tensor],
        attention_mask: torch.Tensor | None = None,
        past_key_values: None = None,
        cache_pass: PromptPass | TokenPass | None = None,
        **attention_arguments: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Project, rotate, attend and project back.

        Args:
            hidden_states: Normed hidden states (B, S, M).
            position_embeddings: Cosine and sine (B, S, d) of each token's angles.
            attention_mask: Handed to the attention function.
            past_key_values: Must be None: the cache of transformers is not read.
            cache_pass: The pass of decoding that this call is part of; None in training.
            attention_arguments: Handed to the attention function.

        Returns:
            (B, S, M), and what the attention function returned beside its output.
        """
        assert past_key_values is None, "the patched model decodes with cpt.model.decoding"
        batch, tokens, _ = hidden_states.shape
        heads = (batch, tokens, -1, self.head_dim)
        q_BHSD = self.q_proj(hidden_states).view(heads).transpose(1, 2)
        k_BKSD = self.k_proj(hidden_states).view(heads).transpose(1, 2)
        v_BKSD = self.v_proj(hidden_states).view(heads).transpose(1, 2)
        q_BHSD, k_BKSD = rotate(q_BHSD, k_BKSD, *position_embeddings)
        if isinstance(cache_pass, TokenPass):
            attended_B1HD = cache_pass.attend(
                self.layer_idx, q_BHSD, k_BKSD, v_BKSD, self.sinks, self.scaling
            )
            return self.o_proj(attended_B1HD.reshape(batch, tokens, -1)), None
        if cache_pass is not None:
            cache_pass.keep(self.layer_idx, k_BKSD, v_BKSD)
        attend = ALL_ATTENTION_FUNCTIONS[self.config._attn_implementation]
        attended_BSHD, probabilities = attend(
            self,
            q_BHSD,
            k_BKSD,
            v_BKSD,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            sliding_window=self.sliding_window,
            s_aux=self.sinks,
            **attention_arguments,
        )
        return self.o_proj(attended_BSHD.reshape(batch, tokens, -1)), probabilities


class CPTDecoderLayer(GptOssDecoderLayer):  # type: ignore[misc]
    """A drop-in for GptOssDecoderLayer, for packed rows and for decoding."""

    def __init__(self, source: GptOssDecoderLayer, mlp: ExpertParallelMLP) -> None:
        nn.Module.__init__(self)
        self.hidden_size = source.hidden_size
        self.self_attn = RotaryAttention(source.self_attn)
        self.mlp = mlp
        self.input_layernorm = InputNorm(source.input_layernorm)
        self.post_attention_layernorm = AddNorm(source.post_attention_layernorm)

    def forward(  # type: ignore[override]
        self, hidden_states: torch.Tensor, **attention_arguments: Any
    ) -> torch.Tensor:
        """Return the hidden states (B, S, M) after attention and experts.

        Args:
            hidden_states: (B, S, M).
            attention_arguments: What transformers gives a layer besides, for its attention.
        """
        residual_BSM, normed_BSM = self.input_layernorm(hidden_states)
        attended_BSM, _ = self.self_attn(hidden_states=normed_BSM, **attention_arguments)
        residual_BSM, normed_BSM = self.post_attention_layernorm(residual_BSM, attended_BSM)
        out_BSM, _ = self.mlp(normed_BSM)
        return residual_BSM + out_BSM

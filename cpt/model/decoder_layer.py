"""A layer of gpt-oss with its elementwise steps fused: additions and norms.

The modules take over the parameters of the Hugging Face modules that they replace, under the same
names. Each owns its parameters, because the engine's hooks gather those of the module that runs.

Source of the maths: GptOssDecoderLayer and GptOssRMSNorm in transformers,
models/gpt_oss/modeling_gpt_oss.py, the same in 5.17 and in 5.23.

Shape letters: B rows, S local tokens of a row, M model size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssDecoderLayer, GptOssRMSNorm

from cpt.model.experts.layer import ExpertParallelMLP
from cpt.model.kernels.rms_norm import add_rms_norm, rms_norm


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


class CPTDecoderLayer(GptOssDecoderLayer):  # type: ignore[misc]
    """A drop-in for GptOssDecoderLayer, for packed rows without a key/value cache."""

    def __init__(self, source: GptOssDecoderLayer, mlp: ExpertParallelMLP) -> None:
        nn.Module.__init__(self)
        self.hidden_size = source.hidden_size
        self.self_attn = source.self_attn
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

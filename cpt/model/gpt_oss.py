"""The gpt-oss model: built from its configuration, patched once, filled with weights.

    load_config -> skeleton on the meta device -> patch -> materialize (whole, or this rank's
    ZeRO-3 part) -> engine -> fill the rank's part (random or from files, see weights/source.py)

Shape letters: B rows, S local tokens of a row, M model size, V vocabulary.

Decisions
    - `GptOssForCPT` adds one forward to Hugging Face's class: it returns the loss of every token,
      not logits. Everything else that differs from Hugging Face is done by `patch`, which reports
      what it changed.
    - The model is never whole in memory: experts of other ranks exist on meta only, and under
      ZeRO-3 a parameter is cut up as soon as it is allocated, before it has a value.
    - Rotary frequencies are computed again in fp32 after materializing; a bf16 or meta build gets
      them wrong.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import (
    GptOssAttention,
    GptOssDecoderLayer,
    GptOssForCausalLM,
    GptOssMLP,
    GptOssRMSNorm,
    GptOssRotaryEmbedding,
)

from cpt.model import attention
from cpt.model.decoder_layer import CPTDecoderLayer, RMSNorm
from cpt.model.experts.layer import ExpertParallelMLP
from cpt.model.loss.divergence import TopKTargets
from cpt.model.loss.head import LossHead
from cpt.parallel.topology import Topology
from cpt.storage.allocation import allocate


class GptOssForCPT(GptOssForCausalLM):  # type: ignore[misc]
    """A GptOssForCausalLM whose forward returns the loss of every token."""

    def forward(  # type: ignore[override]
        self,
        input_ids: torch.Tensor,
        position_ids: torch.Tensor,
        labels: torch.Tensor | None = None,
        logits_at: torch.Tensor | None = None,
        targets: TopKTargets | None = None,
        num_labels: int | None = None,
        top_k: int | None = None,
        **attention_arguments: Any,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Return the loss of every token, or logits without labels.

        Args:
            input_ids: (B, S) local tokens.
            position_ids: (B, S) position of each token in its document.
            labels: (B, S) next tokens, already shifted; -100 where there is none.
            logits_at: (n,) places in the B * S tokens whose logits alone are wanted; only without
                labels.
            targets: Another model's distribution for some of the tokens; only with labels.
            num_labels: How many labels are not -100, if it is known on the host.
            top_k: How many of the likeliest next tokens are wanted of the tokens with a label.
            attention_arguments: `packed_rows`, `sequence_parallel`, `kernel` and `cache_pass`,
                handed to every layer's attention.

        Returns:
            (B, S) nats, 0 where the label is -100, with targets (2, B, S), the second their
            divergence; (B, S, V) logits if labels is None, (n, V) with `logits_at`. With
            `top_k`, what `LossHead.top_k` returns for the tokens that have a label.
        """
        hidden = self.hidden_states(input_ids, position_ids, **attention_arguments)
        if logits_at is not None:
            hidden = hidden.flatten(0, 1)[logits_at]
        return self.lm_head(hidden, labels, targets, num_labels, top_k)

    def hidden_states(
        self, input_ids: torch.Tensor, position_ids: torch.Tensor, **attention_arguments: Any
    ) -> torch.Tensor:
        """Return the last hidden states (B, S, M); the arguments are those of `forward`."""
        return self.model(
            input_ids=input_ids,
            position_ids=position_ids,
            attention_mask={"full_attention": None, "sliding_attention": None},
            use_cache=False,
            **attention_arguments,
        ).last_hidden_state


@dataclass(frozen=True, kw_only=True, slots=True)
class PatchReport:
    """The changes that `patch` made, for the log."""

    attention: str
    """Name of the registered attention function."""
    layers: int
    """Layers replaced by ones whose additions, norms and rotations are fused."""
    expert_layers: int
    """MLPs replaced by expert-parallel ones."""
    experts_per_rank: int
    """Experts of each layer that this rank holds."""
    loss_head: str
    """Name of the class that took the place of lm_head."""

    def __str__(self) -> str:
        return (
            f"attention={self.attention}, {self.layers} layers -> CPTDecoderLayer, "
            f"{self.expert_layers} MLPs -> ExpertParallelMLP "
            f"({self.experts_per_rank} experts each on this rank), lm_head -> {self.loss_head}"
        )


def patch(
    model: GptOssForCPT, topology: Topology, *, experts_in_halves: bool = False
) -> PatchReport:
    """Replace attention, layers, norms, MLPs and lm_head of a Hugging Face gpt-oss, once.

    It happens before the model has weights.

    Args:
        model: The model as Hugging Face builds it.
        topology: The layout.
        experts_in_halves: Whether expert exchange and computation overlap; see `overlap.py`.

    Raises:
        TypeError: A layer, a part of one, the last norm or the lm_head is not the class that this
            was written for.
    """
    model.set_attn_implementation(attention.register())
    layers = model.model.layers
    for index, layer in enumerate(layers):
        name = f"layers.{index}"
        _check_class(f"{name}.mlp", layer.mlp, GptOssMLP)
        _check_class(f"{name}.self_attn", layer.self_attn, GptOssAttention)
        _check_class(f"{name}.input_layernorm", layer.input_layernorm, GptOssRMSNorm)
        _check_class(
            f"{name}.post_attention_layernorm", layer.post_attention_layernorm, GptOssRMSNorm
        )
        _check_class(name, layer, GptOssDecoderLayer)
        mlp = ExpertParallelMLP(layer.mlp, topology, in_halves=experts_in_halves)
        layers[index] = CPTDecoderLayer(layer, mlp)
    _check_class("norm", model.model.norm, GptOssRMSNorm)
    model.model.norm = RMSNorm(model.model.norm)
    _check_class("lm_head", model.lm_head, nn.Linear)
    with model.lm_head.weight.device:
        head = LossHead(
            model.config.hidden_size,
            model.config.vocab_size,
            bias=False,
            dtype=model.lm_head.weight.dtype,
        )
    head.weight = model.lm_head.weight
    model.lm_head = head
    return PatchReport(
        attention=model.config._attn_implementation,
        layers=len(layers),
        expert_layers=len(layers),
        experts_per_rank=layers[0].mlp.num_local_experts,
        loss_head="LossHead",
    )


def _check_class(name: str, module: nn.Module, expected: type[nn.Module]) -> None:
    if type(module) is not expected:
        raise TypeError(
            f"{name} is {type(module).__name__}, expected {expected.__name__}: patched twice?"
        )


def skeleton(config: GptOssConfig, dtype: torch.dtype) -> GptOssForCPT:
    """Build the unpatched model on the meta device.

    For names and shapes alone use `cpt.model.parameters`, which builds it once.
    """
    with torch.device("meta"):
        model = GptOssForCPT(config)
    nn.Module.to(model, dtype)
    return model


def materialize(model: GptOssForCPT, device: torch.device) -> None:
    """Allocate this rank's parameters whole, without values.

    Under ZeRO-3, use `cpt.deepspeed_adapter.partition.materialize_partitioned` instead.
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, allocate(parameter, device))
    restore_rotary_frequencies(model, device)


def restore_rotary_frequencies(model: GptOssForCPT, device: torch.device) -> None:
    """Compute the rotary frequencies in fp32; those of a meta or bf16 build are wrong."""
    model.model.rotary_emb = GptOssRotaryEmbedding(config=model.config).to(device)

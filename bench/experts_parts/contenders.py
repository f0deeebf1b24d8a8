"""The MoE layers of this project and of transformers, each as one forward and backward.

All hold the same weights, and each includes the router, the sorting and the sum over a token's
experts.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from measuring import Step
from torch import nn
from transformers import GptOssConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP

from cpt.model.experts.layer import ExpertParallelMLP
from cpt.parallel.traffic import Traffic

OURS = "this project"
EAGER = "eager"
GROUPED = "grouped_mm"
BATCHED = "batched_mm"
NAMES = (OURS, EAGER, GROUPED, BATCHED)


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One MoE layer and what goes through it."""

    experts: int
    """Experts of the layer."""
    top_k: int
    """Experts of a token."""
    tokens: int
    """Tokens of one pass."""
    hidden: int
    """Size of the model."""
    expert_size: int
    """Size of an expert."""
    device: torch.device
    """Device on which it runs."""

    @property
    def flops(self) -> int:
        """Floating-point operations of the experts' products, forward and backward.

        Recomputation does not count.
        """
        return 3 * 2 * self.tokens * self.top_k * 3 * self.hidden * self.expert_size

    @property
    def batched_bytes(self) -> int:
        """Bytes that batched_mm copies in the forward: its expert's bf16 weights for each row."""
        return self.tokens * self.top_k * 3 * self.hidden * self.expert_size * 2


def build(name: str, layer: Layer, topology: Any = None) -> nn.Module:
    """Return the layer of a contender in bf16, with random weights and biases.

    Args:
        topology: Ranks among which this project's layer shares its experts; None: it holds all.
    """
    config = GptOssConfig(
        hidden_size=layer.hidden,
        intermediate_size=layer.expert_size,
        num_local_experts=layer.experts,
        num_experts_per_tok=layer.top_k,
    )
    config._experts_implementation = "eager" if name == OURS else name
    torch.manual_seed(0)
    mlp = GptOssMLP(config).to(torch.bfloat16)
    for parameter in mlp.parameters():
        nn.init.normal_(parameter, std=layer.hidden**-0.5)
    if name == OURS:
        alone = SimpleNamespace(ep_size=1, ep_rank=0, ep_group=None, traffic=Traffic())
        mlp = ExpertParallelMLP(copy.deepcopy(mlp), topology or alone)
    return mlp.to(layer.device).train()


def make_step(name: str, layer: Layer) -> Step:
    """Return one forward and backward pass, which first drops gradients as an optimizer does."""
    mlp = build(name, layer)
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randn(2, 1, layer.tokens, layer.hidden, generator=generator)
    hidden, d_out = drawn.bfloat16().to(layer.device)

    def step() -> None:
        mlp.zero_grad(set_to_none=True)
        mlp(hidden.detach().requires_grad_())[0].backward(d_out)

    return step

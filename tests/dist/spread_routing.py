"""Routers that send the tokens of a small model to many experts, unevenly and without close calls.

A layout adds in another order, so a router's logits differ between layouts in their last bits.  A
token whose second and third expert are nearly equal could then go to another expert, and the losses
would differ for no fault.  Chosen logits are therefore far above the others by construction.

Tokens have kinds.  A kind has a coordinate of its own in the embedding that outweighs the biases of
all layers, and a router gives two experts of each kind a large weight on that coordinate.
`test_layout_parity.py` holds how far loads are spread, and the margins, by a `RouterWatch`.

Legend: N tokens, E experts.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers import GptOssForCausalLM

NUM_KINDS = 16
"""Kinds of tokens: a token's is its number modulo this."""
POPULARITY = (8.0, 6.0, 5.0, 4.0, 3.0, 2.0, 2.0, 1.0)
"""How likely a kind chooses each expert of layer 0; further layers have it shifted."""
SHIFT = 3
"""By how many experts the popularity of a layer is shifted from that of the layer before."""
UNUSED = (1, 5)
"""Layer and expert that no token chooses."""
EMBEDDED = 8.0
"""Coordinate of a token's kind. Biases of attention and experts add up to about 1 there."""
WEIGHTS = (0.7, 0.55)
"""Router weight of a kind's first and second expert; what is embedded is near 6 in a norm."""


@torch.no_grad()
def spread_routing(model: GptOssForCausalLM, *, seed: int) -> None:
    """Let every router of a model send each kind of tokens to two experts of its own choice."""
    embedding = model.model.embed_tokens.weight
    tokens = torch.arange(embedding.shape[0])
    embedding[tokens, tokens % NUM_KINDS] += EMBEDDED
    generator = torch.Generator().manual_seed(seed)
    for number, layer in enumerate(model.model.layers):
        popularity = torch.tensor(POPULARITY).roll(SHIFT * number)
        if number == UNUSED[0]:
            popularity[UNUSED[1]] = 0.0
            layer.mlp.router.bias[UNUSED[1]] = -50.0
        for kind in range(NUM_KINDS):
            chosen = torch.multinomial(popularity, len(WEIGHTS), generator=generator)
            layer.mlp.router.weight[chosen, kind] += torch.tensor(WEIGHTS)


class RouterWatch:
    """The load and the margins of every router of a model, forward pass after forward pass."""

    def __init__(self, model: GptOssForCausalLM) -> None:
        self.top_k = model.config.num_experts_per_tok
        num_experts = model.config.num_local_experts
        layers = list(model.model.layers)
        self.loads = torch.zeros(len(layers), num_experts, dtype=torch.int64)
        """Choices of each expert by layer."""
        self.margins = torch.full((len(layers),), float("inf"))
        """Least difference between the last chosen and the first other logit by layer."""
        for number, layer in enumerate(layers):
            layer.mlp.router.register_forward_hook(partial(self._look, number))

    @torch.no_grad()
    def _look(self, layer: int, router: nn.Module, inputs: tuple[Any, ...], _: Any) -> None:
        hidden = inputs[0].reshape(-1, inputs[0].shape[-1])
        logits_NE = F.linear(hidden, router.weight, router.bias)
        ordered_NE, experts_NE = logits_NE.sort(1, descending=True)
        chosen = experts_NE[:, : self.top_k].flatten()
        self.loads[layer] += chosen.bincount(minlength=logits_NE.shape[1])
        margin = (ordered_NE[:, self.top_k - 1] - ordered_NE[:, self.top_k]).min()
        self.margins[layer] = torch.minimum(self.margins[layer], margin)

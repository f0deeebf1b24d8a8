"""This project's attention and what a user would pick instead, each as one forward and backward.

All get query, key and value as a Hugging Face layer hands them over, (1, heads, tokens, head size)
with tokens first in memory, and give back (1, tokens, heads, head size).

Shape suffixes: T tokens of the row, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.gpt_oss.modeling_gpt_oss import eager_attention_forward

from cpt.model.attention import PackedRows, sink_attention
from cpt.model.attention.choice import BACKENDS, chosen_backend
from cpt.model.attention.machine import Machine

EAGER = "Hugging Face eager"
PLAIN = "no sinks"
WINDOW = 128
EAGER_COPIES = 4.5
"""Matrices of (heads, tokens, tokens) that eager holds at its peak.

Measured at 1k and 4k tokens on the CPU.
"""

Step = Callable[[], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One attention layer on one row that is one document."""

    tokens: int
    """Tokens of the row."""
    window: int | None
    """Keys that a query sees, itself included; None for all before it."""
    heads: int
    """Query heads."""
    kv_heads: int
    """Key/value heads."""
    head_dim: int
    """Size of a head."""
    device: torch.device
    """Device on which it runs."""

    @property
    def kind(self) -> str:
        """Name of the kind of layer."""
        return "full" if self.window is None else "window"

    @property
    def flops(self) -> int:
        """Floating-point operations of a pass, over the pairs that a query may see.

        The forward has two matrix products, and the backward has five.
        """
        width = min(self.window or self.tokens, self.tokens)
        pairs = width * (width + 1) // 2 + (self.tokens - width) * width
        return 7 * 2 * pairs * self.head_dim * self.heads

    @property
    def eager_bytes(self) -> int:
        """Bytes that eager needs at its peak in bf16."""
        return int(EAGER_COPIES * self.heads * self.tokens**2 * 2)

    def draw(self) -> list[Tensor]:
        """Draw query, key, value, the gradient of the output, and sinks."""
        tensors = []
        for heads in (self.heads, self.kv_heads, self.kv_heads):
            tensors.append(self._draw_heads(heads).transpose(1, 2))
        d_out = self._draw_heads(self.heads)
        sinks = torch.linspace(-3, 9, self.heads, device=self.device).bfloat16()
        return [*tensors, d_out, sinks]

    def _draw_heads(self, heads: int) -> Tensor:
        shape = (1, self.tokens, heads, self.head_dim)
        return torch.randn(shape, dtype=torch.bfloat16, device=self.device)


def auto_name(device: torch.device, head_dim: int) -> str:
    """Return the name of the backend that `auto` takes here."""
    return chosen_backend("auto", device=device, dtype=torch.bfloat16, head_dim=head_dim).name


def usable_backends(device: torch.device, head_dim: int) -> list[str]:
    """Return the backends that can run here, beginning with the one that `auto` takes.

    The reference is quadratic and left out.
    """
    machine = Machine.of(device)
    names = [auto_name(device, head_dim)]
    for backend in BACKENDS:
        if backend.name == "reference" or backend.name in names:
            continue
        if backend.usable(device, torch.bfloat16, head_dim, machine) is None:
            names.append(backend.name)
    return names


def contender_names(layer: Layer) -> list[str]:
    """Return the contenders, this project's backends first.

    The kernel without sinks knows windows on a GPU only.
    """
    return [*usable_backends(layer.device, layer.head_dim), PLAIN, EAGER]


def make_step(name: str, layer: Layer) -> Step:
    """Return one forward and backward pass of a contender.

    What a model would share between its layers is made here, once.
    """
    if name == EAGER:
        forward = _eager(layer)
    elif name == PLAIN:
        forward = _plain(layer)
    else:
        forward = _ours(name, layer)
    query, key, value, d_out, sinks = layer.draw()

    def step() -> None:
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value, sinks)]
        forward(*leaves).backward(d_out)  # type: ignore[no-untyped-call]

    return step


def _ours(name: str, layer: Layer) -> Callable[..., Tensor]:
    settings: dict[str, Any] = {
        "scaling": layer.head_dim**-0.5,
        "sliding_window": layer.window,
        "kernel": name,
        "packed_rows": PackedRows.from_bounds([[0, layer.tokens]], layer.tokens),
    }

    def forward(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
        out, _ = sink_attention(nn.Identity(), query, key, value, None, s_aux=sinks, **settings)
        return out

    return forward


def _eager(layer: Layer) -> Callable[..., Tensor]:
    """Return transformers' own function, with the mask that a model builds once."""
    index = torch.arange(layer.tokens, device=layer.device)
    back = index[:, None] - index
    hidden = (back < 0) | (back >= (layer.window or layer.tokens))
    mask = torch.zeros(hidden.shape, dtype=torch.bfloat16, device=layer.device)
    mask.masked_fill_(hidden, -torch.inf)
    groups = layer.heads // layer.kv_heads
    scaling = layer.head_dim**-0.5

    def forward(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
        module: Any = SimpleNamespace(num_key_value_groups=groups, sinks=sinks, training=True)
        out, _ = eager_attention_forward(module, query, key, value, mask, scaling=scaling)
        return out

    return forward


def _plain(layer: Layer) -> Callable[..., Tensor]:
    """Return attention without sinks.

    On a GPU it is FlashAttention with its window, and on a CPU full causal attention.
    """
    if layer.device.type == "cpu":
        return _full_causal
    from torch.nn.attention.varlen import varlen_attn

    offsets = torch.tensor([0, layer.tokens], dtype=torch.int32, device=layer.device)
    left = -1 if layer.window is None else layer.window - 1

    def forward(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
        tokens_first = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
        settings: dict[str, Any] = {"window_size": (left, 0), "enable_gqa": True}
        lengths = (offsets, offsets, layer.tokens, layer.tokens)
        out: Any = varlen_attn(*tokens_first, *lengths, **settings)
        return out[None]

    return forward


def _full_causal(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
    del sinks
    out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
    return out.transpose(1, 2)

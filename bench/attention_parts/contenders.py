"""What is compared: this project's attention, and what a user would pick instead; each is one
forward and backward.

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
"""Matrices of (heads, tokens, tokens) that eager holds at its peak, measured at 1k and 4k tokens on
the CPU.
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
    """Where it runs."""

    @property
    def kind(self) -> str:
        """Name of the kind of layer."""
        return "full" if self.window is None else "window"

    @property
    def flops(self) -> int:
        """Of the two products of the forward and the five of the backward, over the pairs that a
        query may see.
        """
        width = min(self.window or self.tokens, self.tokens)
        pairs = width * (width + 1) // 2 + (self.tokens - width) * width
        return 7 * 2 * pairs * self.head_dim * self.heads

    @property
    def eager_bytes(self) -> int:
        """What eager needs at its peak in bf16."""
        return int(EAGER_COPIES * self.heads * self.tokens**2 * 2)

    def draw(self) -> list[Tensor]:
        """Query, key, value, the gradient of the output, and sinks."""
        counts = (self.heads, self.kv_heads, self.kv_heads)
        shapes = [(1, self.tokens, count, self.head_dim) for count in counts]
        tensors = [
            torch.randn(shape, dtype=torch.bfloat16, device=self.device).transpose(1, 2)
            for shape in shapes
        ]
        d_out = torch.randn(
            1, self.tokens, self.heads, self.head_dim, dtype=torch.bfloat16, device=self.device
        )
        return [*tensors, d_out, torch.linspace(-3, 9, self.heads, device=self.device).bfloat16()]


def auto_name(device: torch.device, head_dim: int) -> str:
    """The backend that `auto` takes here."""
    return chosen_backend("auto", device=device, dtype=torch.bfloat16, head_dim=head_dim).name


def usable_backends(device: torch.device, head_dim: int) -> list[str]:
    """Backends that can run here, the one that `auto` takes first; the reference is quadratic and
    left out.
    """
    machine = Machine.of(device)
    first = auto_name(device, head_dim)
    names = [
        backend.name
        for backend in BACKENDS
        if backend.name != "reference"
        and backend.usable(device, torch.bfloat16, head_dim, machine) is None
    ]
    return [first, *(name for name in names if name != first)]


def contender_names(layer: Layer) -> list[str]:
    """This project's first; the kernel without sinks knows windows on a GPU only."""
    return [*usable_backends(layer.device, layer.head_dim), PLAIN, EAGER]


def make_step(name: str, layer: Layer) -> Step:
    """One forward and backward pass of a contender; what a model would share between layers is made
    here, once.
    """
    if name == EAGER:
        forward = _eager(layer)
    elif name == PLAIN:
        forward = _plain(layer)
    else:
        forward = _ours(name, layer)
    query, key, value, d_out, sinks = layer.draw()

    def step() -> None:
        leaves = [x.detach().requires_grad_() for x in (query, key, value, sinks)]
        forward(*leaves).backward(d_out)  # type: ignore[no-untyped-call]

    return step


def _ours(name: str, layer: Layer) -> Callable[..., Tensor]:
    rows = PackedRows.from_bounds([[0, layer.tokens]], layer.tokens)

    def forward(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
        settings: dict[str, Any] = {
            "scaling": layer.head_dim**-0.5,
            "sliding_window": layer.window,
            "kernel": name,
        }
        return sink_attention(
            nn.Identity(), query, key, value, None, s_aux=sinks, packed_rows=rows, **settings
        )[0]

    return forward


def _eager(layer: Layer) -> Callable[..., Tensor]:
    """transformers' own function, with the mask that the model builds once for all layers of a
    kind.
    """
    index = torch.arange(layer.tokens, device=layer.device)
    back = index[:, None] - index
    hidden = (back < 0) | (back >= (layer.window or layer.tokens))
    mask = torch.zeros(hidden.shape, dtype=torch.bfloat16, device=layer.device).masked_fill_(
        hidden, -torch.inf
    )

    def forward(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
        module: Any = SimpleNamespace(
            num_key_value_groups=layer.heads // layer.kv_heads, sinks=sinks, training=True
        )
        return eager_attention_forward(
            module, query, key, value, mask, scaling=layer.head_dim**-0.5
        )[0]

    return forward


def _plain(layer: Layer) -> Callable[..., Tensor]:
    """Attention without sinks: FlashAttention with its window on a GPU, full causal attention on a
    CPU.
    """
    if layer.device.type == "cpu":
        return lambda query, key, value, sinks: F.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        ).transpose(1, 2)
    from torch.nn.attention.varlen import varlen_attn

    offsets = torch.tensor([0, layer.tokens], dtype=torch.int32, device=layer.device)
    left = -1 if layer.window is None else layer.window - 1

    def forward(query: Tensor, key: Tensor, value: Tensor, sinks: Tensor) -> Tensor:
        tokens_first = (x[0].transpose(0, 1) for x in (query, key, value))
        settings: dict[str, Any] = {"window_size": (left, 0), "enable_gqa": True}
        return varlen_attn(*tokens_first, offsets, offsets, layer.tokens, layer.tokens, **settings)[
            None
        ]  # type: ignore[index]

    return forward

"""Bytes, FLOPs and launches of one micro step on a GPU, by part of the model and by pass.

    gpu_counts.json (bench/gpu_counts.py counts the real step on fake tensors)
      -> every quantity of a part as a polynomial in the tokens of a rank
      -> scaled to the sizes of a model, and to a layout

Decisions
    - The table has gpt-oss-20b on one rank at three lengths; a parabola through them is exact
      there. Its constant is what weights cost, its linear part what tokens cost; the loss head
      alone has a square, because its gradient is added up once for every tile.
    - Constants grow with a part's weights in a layer, the rest with the values of a token. The
      FLOPs of attention are not taken from the table: they depend on the length of a row.
    - Exchanges change what is moved on the device, too. That is taken from the table's shape with
      expert and sequence parallelism, per token and layer.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import GptOssConfig

from cpt.model.configuration import load_config

TABLE = Path(__file__).with_name("gpu_counts.json")

PASSES = ("forward", "recompute", "backward")
"""The passes of a layer; the second only with activation checkpointing."""
ONCE = ("loss head", "embedding", "engine")
"""Parts that a model has once, not in every layer."""
ATTENTION_FLOPS = {"forward": 1.0, "recompute": 1.0, "backward": 2.5}
"""FLOPs of the attention core in units of its forward; the backward computes the scores again."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelSizes:
    """The sizes of a model that its work depends on."""

    layers: int
    hidden: int
    intermediate: int
    experts: int
    experts_per_token: int
    query_width: int
    """Query heads times head size."""
    key_width: int
    """Key heads times head size."""
    vocab: int

    @classmethod
    def of(cls, model: GptOssConfig) -> ModelSizes:
        """Return the sizes of a model."""
        return cls(
            layers=model.num_hidden_layers,
            hidden=model.hidden_size,
            intermediate=model.intermediate_size,
            experts=model.num_local_experts,
            experts_per_token=model.num_experts_per_tok,
            query_width=model.num_attention_heads * model.head_dim,
            key_width=model.num_key_value_heads * model.head_dim,
            vocab=model.vocab_size,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """What one rank computes in one micro step."""

    tokens: int
    """Tokens of this rank."""
    attention_flops: float
    """FLOPs of the attention core in full layers, forward."""
    window_flops: float
    """FLOPs of the attention core in window layers, forward."""
    ep_size: int = 1
    sp_size: int = 1
    imbalance: float = 1.0
    """Rows of this rank's experts over the mean of all ranks."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """The work of one part in one pass over all layers."""

    launches: float
    """Kernels started."""
    flops: float
    """FLOPs of products, without attention in windows."""
    window_flops: float
    """FLOPs of attention in windows."""
    product_bytes: float
    """Bytes that products read and write."""
    weight_bytes: float
    """Those of `product_bytes` that are there however few the tokens."""
    other_bytes: float
    """Bytes that everything else reads and writes."""
    eight_bit_flops: float = 0.0
    """Those of `flops` that are in 8 bits."""

    def flops_at(self, eight_bit_ratio: float) -> float:
        """Return the FLOPs in bf16 that take as long, if 8 bits are that many times as fast."""
        return self.flops - self.eight_bit_flops * (1 - 1 / eight_bit_ratio)


@dataclass(frozen=True, slots=True)
class Parabola:
    """A quantity as a function of tokens."""

    constant: float
    linear: float
    square: float

    @classmethod
    def through(cls, points: list[tuple[int, float]]) -> Parabola:
        """Return the parabola through three points."""
        (x0, y0), (x1, y1), (x2, y2) = points
        slope = (y1 - y0) / (x1 - x0)
        next_slope = (y2 - y1) / (x2 - x1)
        square = (next_slope - slope) / (x2 - x0)
        linear = slope - square * (x0 + x1)
        return cls(y0 - linear * x0 - square * x0**2, linear, square)

    def growing(self, tokens: float) -> float:
        """Return the part that depends on the tokens."""
        return self.linear * tokens + self.square * tokens**2


@dataclass(frozen=True, kw_only=True, slots=True)
class PartSizes:
    """The sizes of a part in one layer that its work grows with."""

    weights: float
    """Its weights on one rank; 1 if it has hardly any."""
    values: float
    """The values of one token that it reads and writes, up to a factor."""
    flops: float = 1.0
    """Weights that one token is multiplied with."""


def part_sizes(part: str, model: ModelSizes, ep_size: int) -> PartSizes:
    """Return the sizes of a part."""
    hidden = model.hidden
    widths = 2 * model.query_width + 2 * model.key_width
    if part == "experts":
        expert = hidden * model.intermediate
        return PartSizes(
            weights=model.experts / ep_size * expert,
            values=model.experts_per_token * (hidden + model.intermediate),
            flops=model.experts_per_token * expert,
        )
    if part == "attention projections":
        return PartSizes(weights=hidden * widths, values=hidden + widths, flops=hidden * widths)
    if part == "loss head":
        table = hidden * model.vocab
        return PartSizes(weights=table, values=model.vocab, flops=table)
    if part == "embedding":
        return PartSizes(weights=hidden * model.vocab, values=hidden)
    if part == "router":
        router = hidden * model.experts
        return PartSizes(weights=router, values=hidden + model.experts, flops=router)
    values = {
        "attention core": widths,
        "attention exchange": widths,
        "rope": model.query_width + model.key_width,
        "dispatch": model.experts_per_token * hidden,
        "norms": hidden,
        "residual": hidden,
        "engine": 1,
    }
    return PartSizes(weights=1, values=values[part])


@functools.lru_cache(maxsize=4096)
def work_of_micro_step(model: ModelSizes, share: Share) -> dict[str, dict[str, Work]]:
    """Return the work of one rank in one micro step, by part and pass."""
    counted = _counted()
    works: dict[str, dict[str, Work]] = {}
    for part, passes in counted.on_one_rank.items():
        works[part] = {}
        for name, curves in passes.items():
            works[part][name] = _scaled(part, name, curves, counted.one_rank, model, share)
    exchanging = []
    if share.ep_size > 1:
        exchanging.append("dispatch")
    if share.sp_size > 1:
        exchanging.append("attention exchange")
    for part in exchanging:
        works[part] = {}
        for name, curves in counted.exchanging[part].items():
            works[part][name] = _scaled(part, name, curves, counted.many_ranks, model, share)
    return works


def _scaled(
    part: str,
    name: str,
    curves: dict[str, Parabola],
    counted: _Shape,
    model: ModelSizes,
    share: Share,
) -> Work:
    """Return the work of a part, from that of another model."""
    mine = part_sizes(part, model, share.ep_size)
    theirs = part_sizes(part, counted.sizes, counted.ep_size)
    layers = 1.0 if part in ONCE else model.layers / counted.sizes.layers
    tokens: float = share.tokens
    if part == "experts":
        tokens *= share.imbalance
    weights = layers * mine.weights / theirs.weights
    values = layers * mine.values / theirs.values
    flops = layers * mine.flops / theirs.flops * curves["flops"].growing(tokens)
    window_flops = 0.0
    if part == "attention core":
        flops = ATTENTION_FLOPS[name] * share.attention_flops
        window_flops = ATTENTION_FLOPS[name] * share.window_flops
    launches = curves["launches"]
    # where their number depends on the tokens, it is small beside the work of more tokens
    counted_tokens = min(tokens, counted.most_tokens)
    fixed_bytes = weights * curves["product_bytes"].constant
    all_bytes = weights * curves["num_bytes"].constant
    all_bytes += values * curves["num_bytes"].growing(tokens)
    product_bytes = fixed_bytes + values * curves["product_bytes"].growing(tokens)
    return Work(
        launches=layers * (launches.constant + launches.growing(counted_tokens)),
        flops=flops,
        window_flops=window_flops,
        product_bytes=product_bytes,
        weight_bytes=fixed_bytes,
        other_bytes=max(0.0, all_bytes - product_bytes),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Shape:
    """A shape of the table."""

    sizes: ModelSizes
    ep_size: int
    most_tokens: int
    """The largest number of tokens that was counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Counted:
    """The table as curves, by part, pass and quantity."""

    one_rank: _Shape
    on_one_rank: dict[str, dict[str, dict[str, Parabola]]]
    many_ranks: _Shape
    exchanging: dict[str, dict[str, dict[str, Parabola]]]


@functools.cache
def _counted() -> _Counted:
    table = json.loads(TABLE.read_text(encoding="utf-8"))
    alone = []
    for shape in table["shapes"].values():
        if shape["ep_size"] == shape["sp_size"] == 1:
            alone.append(shape)
        else:
            together = shape
    alone.sort(key=lambda shape: int(shape["tokens"]))
    return _Counted(
        one_rank=_shape(alone[-1]),
        on_one_rank=_curves(alone),
        many_ranks=_shape(together),
        exchanging=_lines_through_zero(together),
    )


def _shape(shape: dict[str, Any]) -> _Shape:
    sizes = ModelSizes.of(load_config(None, shape["preset"]))
    return _Shape(sizes=sizes, ep_size=shape["ep_size"], most_tokens=shape["tokens"])


def _curves(shapes: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, Parabola]]]:
    found: dict[str, dict[str, dict[str, Parabola]]] = {}
    for part, passes in shapes[0]["parts"].items():
        found[part] = {}
        for name, quantities in passes.items():
            found[part][name] = {}
            for quantity in quantities:
                points = []
                for shape in shapes:
                    points.append((shape["tokens"], shape["parts"][part][name][quantity]))
                found[part][name][quantity] = Parabola.through(points)
    return found


def _lines_through_zero(shape: dict[str, Any]) -> dict[str, dict[str, dict[str, Parabola]]]:
    """Return what is known of a shape that was counted at one length only."""
    found: dict[str, dict[str, dict[str, Parabola]]] = {}
    for part in ("dispatch", "attention exchange"):
        found[part] = {}
        for name, quantities in shape["parts"][part].items():
            lines = {}
            for quantity, value in quantities.items():
                lines[quantity] = Parabola(0.0, value / shape["tokens"], 0.0)
            lines["launches"] = Parabola(quantities["launches"], 0.0, 0.0)
            found[part][name] = lines
    return found

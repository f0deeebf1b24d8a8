"""Which products of a model `train.products` computes in 8 bits.

Router, lm_head, embeddings, norms and adapters are never among them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn
from transformers import GptOssConfig

from cpt.config.precision_sections import ProductsSection
from cpt.model.adapters.linear import AdaptedLinear
from cpt.model.gpt_oss import GptOssForCPT
from cpt.model.products.e4m3 import BLOCK
from cpt.model.products.linear import EightBitLinear
from cpt.model.products.recipe import EightBit

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
"""The linear layers of attention."""


@dataclass(frozen=True, kw_only=True, slots=True)
class EightBitMatrix:
    """A matrix of a layer, or one per expert, with which two of three products are in 8 bits.

    The two are rows x W, summed along `inputs`, and d_out x W^T, summed along `outputs`.
    """

    name: str
    """Its last name: gate_up_proj, down_proj, q_proj, k_proj, v_proj or o_proj."""
    inputs: int
    """Values that go in."""
    outputs: int
    """Values that come out."""
    of_experts: bool
    """Whether there is one for each expert."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ChosenProducts:
    """How the 8-bit products of a run are computed."""

    experts: EightBit | None
    """Those of the experts; None for the working precision."""
    attention: EightBit | None
    """Those of the projections of attention."""
    layers: range
    """The layers in which there are any."""
    why_emulated: Mapping[str, str] = field(default_factory=dict)
    """Why no kernel computes those of `experts` or of `attention`, where none does."""


def eight_bit_layers(section: ProductsSection, num_layers: int) -> range:
    """Return the numbers of the layers that have 8-bit products."""
    if not section.is_on:
        return range(0)
    first, last = section.bf16_layers
    return range(first, max(first, num_layers - last))


def eight_bit_matrices(
    section: ProductsSection, config: GptOssConfig
) -> tuple[EightBitMatrix, ...]:
    """Return the matrices of one of the `eight_bit_layers` whose products are in 8 bits."""
    found = []
    if section.experts == "fp8":
        sizes = config.hidden_size, config.intermediate_size
        for name, inputs, outputs in (
            ("gate_up_proj", sizes[0], 2 * sizes[1]),
            ("down_proj", sizes[1], sizes[0]),
        ):
            found.append(EightBitMatrix(name=name, inputs=inputs, outputs=outputs, of_experts=True))
    if section.attention == "fp8":
        query_size = config.num_attention_heads * config.head_dim
        value_size = config.num_key_value_heads * config.head_dim
        for name, inputs, outputs in (
            ("q_proj", config.hidden_size, query_size),
            ("k_proj", config.hidden_size, value_size),
            ("v_proj", config.hidden_size, value_size),
            ("o_proj", query_size, config.hidden_size),
        ):
            found.append(
                EightBitMatrix(name=name, inputs=inputs, outputs=outputs, of_experts=False)
            )
    return tuple(found)


def products_problems(section: ProductsSection, config: GptOssConfig) -> list[str]:
    """Return what is wrong with `train.products` for a model, on any machine."""
    if not section.is_on:
        return []
    problems = []
    num_layers = config.num_hidden_layers
    if len(eight_bit_layers(section, num_layers)) == 0:
        problems.append(
            f"train.products.bf16_layers is {list(section.bf16_layers)}, but the model has "
            f"{num_layers} layers: no product would be in 8 bits. Lower it, or remove "
            "train.products."
        )
    if section.scaling == "blocks":
        problems += block_problems(section, config)
    return problems


def block_problems(section: ProductsSection, config: GptOssConfig) -> list[str]:
    """Return which matrices cannot be scaled in blocks of 32 values along both of their axes."""
    problems = []
    for matrix in eight_bit_matrices(section, config):
        if matrix.inputs % BLOCK or matrix.outputs % BLOCK:
            problems.append(
                f"train.products: blocks have {BLOCK} values, but {matrix.name} has "
                f"{matrix.inputs} inputs and {matrix.outputs} outputs, which are not multiples of "
                "it. Give scaling: rows."
            )
    return problems


def put_products(model: GptOssForCPT, chosen: ChosenProducts) -> None:
    """Let a patched model train with 8-bit products; adapters are attached before.

    Evaluation goes on in the working precision.
    """
    for index in chosen.layers:
        layer = model.model.layers[index]
        layer.mlp.experts.eight_bit = chosen.experts
        if chosen.attention is not None:
            for name in PROJECTIONS:
                _put_linear(layer.self_attn, name, chosen.attention)


def _put_linear(owner: nn.Module, name: str, eight_bit: EightBit) -> None:
    linear = getattr(owner, name)
    if isinstance(linear, AdaptedLinear):
        linear.eight_bit = eight_bit
    else:
        setattr(owner, name, EightBitLinear(linear, eight_bit))

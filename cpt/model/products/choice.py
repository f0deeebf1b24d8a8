"""How 8-bit products run on a machine: what shares a scale, by which code, and why.

A kernel that cannot run here is replaced by the emulation, which is the definition, and the start
log says so. A GPU without 8-bit products is refused: there the emulation only costs time.
"""

from __future__ import annotations

import torch
from transformers import GptOssConfig

from cpt.config.precision_sections import ProductsSection
from cpt.errors import ConfigError
from cpt.model.attention.machine import Machine
from cpt.model.products.e4m3 import Scaling
from cpt.model.products.layers import ChosenProducts, block_problems, eight_bit_layers
from cpt.model.products.recipe import EightBit

OLDEST_WITH_FP8 = (8, 9)
"""Compute capability from which a GPU multiplies in 8 bits: Ada, then Hopper."""
BLACKWELL = (10, 0)
"""Compute capability from which a GPU scales blocks of 32 values by itself."""


def choose_products(
    section: ProductsSection,
    config: GptOssConfig,
    device: torch.device,
    machine: Machine | None = None,
) -> ChosenProducts | None:
    """Return how a run computes its 8-bit products; None if it has none.

    Args:
        section: The `train.products` section.
        config: The architecture.
        device: Where the model is.
        machine: Facts about `device`; by default they are read from it.

    Raises:
        ConfigError: this machine cannot, or the model has sizes that the scaling does not fit.
    """
    if not section.is_on:
        return None
    machine = machine or Machine.of(device)
    capability = machine.compute_capability if device.type == "cuda" else None
    if capability is not None and capability < OLDEST_WITH_FP8:
        raise ConfigError(
            f"train.products asks for fp8, but the GPU has compute capability "
            f"{capability[0]}.{capability[1]}, and products in 8 bits begin with 8.9. Emulating "
            "them is slower than bf16 and no nearer to it. Remove train.products."
        )
    scaling = _scaling(section, capability)
    if scaling == "blocks":
        problems = block_problems(section, config)
        if problems:
            raise ConfigError(problems)
    eight_bit = EightBit(scaling)
    return ChosenProducts(
        experts=eight_bit if section.experts == "fp8" else None,
        attention=eight_bit if section.attention == "fp8" else None,
        layers=eight_bit_layers(section, config.num_hidden_layers),
    )


def _scaling(section: ProductsSection, capability: tuple[int, int] | None) -> Scaling:
    if section.scaling != "auto":
        return section.scaling
    if capability is not None and capability >= BLACKWELL:
        return "blocks"
    return "rows"


def products_summary(chosen: ChosenProducts) -> str:
    """Return one line for the start log."""
    parts = []
    for name, eight_bit in (("experts", chosen.experts), ("attention", chosen.attention)):
        if eight_bit is not None:
            shared = "row" if eight_bit.scaling == "rows" else "block of 32"
            parts.append(f"{name} in E4M3, a scale for each {shared}, emulated")
    layers = chosen.layers
    return f"{'; '.join(parts)}; layers {layers.start} to {layers.stop - 1}; not measured on a GPU"

"""How 8-bit products run on a machine: what shares a scale, by which code, and why.

A kernel that cannot run here is replaced by the emulation, which is the definition, and the start
log says so. A GPU without 8-bit products is refused: there the emulation only costs time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import GptOssConfig

from cpt.config.precision_sections import ProductsSection
from cpt.errors import ConfigError
from cpt.model.attention.machine import Machine
from cpt.model.products.e4m3 import Scaling
from cpt.model.products.layers import (
    ChosenProducts,
    block_problems,
    eight_bit_layers,
    eight_bit_matrices,
)
from cpt.model.products.recipe import EightBit

OLDEST_WITH_FP8 = (8, 9)
"""Compute capability from which a GPU multiplies in 8 bits: Ada, then Hopper."""
BLACKWELL = (10, 0)
"""Compute capability from which a GPU scales blocks of 32 values by itself."""
STEP = 16
"""Both sizes of a matrix must be multiples of it: a row of codes begins on 16 bytes."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _Kernel:
    """What a function of torch needs."""

    function: str
    """Its name in torch."""
    rows_on: tuple[str, ...]
    """Compute capabilities on which it scales rows, as MAJOR.MINOR or MAJOR."""
    blocks_on: tuple[str, ...]
    """Those on which it scales blocks."""


EXPERTS = _Kernel(function="_scaled_grouped_mm", rows_on=("9",), blocks_on=("10",))
ATTENTION = _Kernel(function="_scaled_mm", rows_on=("8.9", "9", "10"), blocks_on=("10",))


def choose_products(
    section: ProductsSection,
    config: GptOssConfig,
    device: torch.device,
    dtype: torch.dtype,
    machine: Machine | None = None,
) -> ChosenProducts | None:
    """Return how a run computes its 8-bit products; None if it has none.

    Args:
        section: The `train.products` section.
        config: The architecture.
        device: Where the model is.
        dtype: The working precision.
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
            "them is slower than bf16. Remove train.products."
        )
    scaling = _scaling(section, capability)
    problems = block_problems(section, config) if scaling == "blocks" else []
    if problems:
        raise ConfigError(problems)
    reasons: dict[str, str] = {}

    def chosen(name: str, kernel: _Kernel) -> EightBit | None:
        if getattr(section, name) != "fp8":
            return None
        found = kernel_problems(kernel, scaling, machine, capability, dtype)
        found += _size_problems(section, config, of_experts=kernel is EXPERTS)
        if found:
            reasons[name] = "; ".join(found)
        return EightBit(scaling, by_kernel=not found)

    return ChosenProducts(
        experts=chosen("experts", EXPERTS),
        attention=chosen("attention", ATTENTION),
        layers=eight_bit_layers(section, config.num_hidden_layers),
        why_emulated=reasons,
    )


def _scaling(section: ProductsSection, capability: tuple[int, int] | None) -> Scaling:
    if section.scaling != "auto":
        return section.scaling
    if capability is not None and capability >= BLACKWELL:
        return "blocks"
    return "rows"


def kernel_problems(
    kernel: _Kernel,
    scaling: Scaling,
    machine: Machine,
    capability: tuple[int, int] | None,
    dtype: torch.dtype,
) -> list[str]:
    """Return why a kernel cannot run on a machine."""
    if capability is None:
        return ["the model is on a CPU"]
    found = []
    if machine.is_rocm:
        found.append("its kernels are for CUDA")
    if dtype != torch.bfloat16:
        found.append(f"it gives bf16, and the working precision is {dtype}")
    served = kernel.rows_on if scaling == "rows" else kernel.blocks_on
    major, minor = capability
    if f"{major}.{minor}" not in served and str(major) not in served:
        found.append(
            f"torch.{kernel.function} scales {scaling} on compute capability "
            f"{' and '.join(served)}, this is {major}.{minor}"
        )
    if not hasattr(torch, kernel.function):
        found.append(f"torch {machine.torch_build} has no {kernel.function}")
    return found


def _size_problems(
    section: ProductsSection, config: GptOssConfig, *, of_experts: bool
) -> list[str]:
    """Return which matrices have sizes that the kernels do not serve."""
    found = []
    for matrix in eight_bit_matrices(section, config):
        if matrix.of_experts == of_experts and (matrix.inputs % STEP or matrix.outputs % STEP):
            found.append(f"{matrix.inputs} x {matrix.outputs} are not multiples of {STEP}")
    return found


def products_summary(chosen: ChosenProducts) -> str:
    """Return one line for the start log."""
    parts = []
    for name, eight_bit in (("experts", chosen.experts), ("attention", chosen.attention)):
        if eight_bit is None:
            continue
        shared = "row" if eight_bit.scaling == "rows" else "block of 32"
        how = "by torch's kernel, whose speed this project has not measured"
        if not eight_bit.by_kernel:
            how = f"emulated, which is slower than bf16 ({chosen.why_emulated[name]})"
        parts.append(f"{name} in E4M3, a scale for each {shared}, {how}")
    first, last = chosen.layers.start, chosen.layers.stop - 1
    return f"layers {first} to {last}: {'; '.join(parts)}. Evaluation rounds nothing."

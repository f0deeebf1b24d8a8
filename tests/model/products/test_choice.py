"""Which code computes 8-bit products on a machine, and what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GptOssConfig

from cpt.config.precision_sections import ProductsSection
from cpt.errors import ConfigError
from cpt.model.attention.machine import Machine
from cpt.model.configuration import PRESETS
from cpt.model.products.choice import choose_products, products_summary
from cpt.model.products.layers import (
    ChosenProducts,
    eight_bit_layers,
    eight_bit_matrices,
    products_problems,
)

GPU = torch.device("cuda")
BOTH = ProductsSection(experts="fp8", attention="fp8")


def model(**values: Any) -> GptOssConfig:
    return GptOssConfig(**{**PRESETS["gpt-oss-20b"], **values})


def chosen_on(
    capability: tuple[int, int] | None,
    section: ProductsSection = BOTH,
    dtype: torch.dtype = torch.bfloat16,
) -> ChosenProducts:
    machine = Machine(
        compute_capability=capability, torch_build="2.11.0+cu130", torch_has_flash=True
    )
    device = torch.device("cpu") if capability is None else GPU
    chosen = choose_products(section, model(), device, dtype, machine)
    assert chosen is not None and chosen.experts is not None and chosen.attention is not None
    return chosen


@pytest.mark.parametrize(
    ("capability", "scaling", "experts", "attention"),
    [
        ((8, 9), "rows", False, True),
        ((9, 0), "rows", True, True),
        ((10, 0), "blocks", True, True),
        ((12, 0), "blocks", False, False),
        (None, "rows", False, False),
    ],
    ids=["Ada", "Hopper", "Blackwell", "GeForce Blackwell", "CPU"],
)
def test_each_machine_gets_its_scaling_and_the_kernels_it_has(
    capability: tuple[int, int] | None, scaling: str, experts: bool, attention: bool
) -> None:
    chosen = chosen_on(capability)
    assert chosen.experts is not None and chosen.attention is not None
    assert chosen.experts.scaling == chosen.attention.scaling == scaling
    assert (chosen.experts.by_kernel, chosen.attention.by_kernel) == (experts, attention)
    summary = products_summary(chosen)
    assert ("not measured" in summary) == (experts or attention)
    assert ("emulated" in summary) == (not (experts and attention))


def test_scaling_that_is_asked_for_is_used_without_its_kernel_too() -> None:
    chosen = chosen_on((9, 0), ProductsSection(experts="fp8", attention="fp8", scaling="blocks"))
    assert chosen.experts is not None and not chosen.experts.by_kernel
    assert "scales blocks on compute capability 10, this is 9.0" in products_summary(chosen)


def test_working_precision_of_fp32_is_emulated() -> None:
    chosen = chosen_on((9, 0), dtype=torch.float32)
    assert chosen.experts is not None and not chosen.experts.by_kernel
    assert "gives bf16, and the working precision is torch.float32" in products_summary(chosen)


def test_gpu_without_8_bits_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"compute capability 8\.0.*Remove train\.products"):
        chosen_on((8, 0))


def test_sizes_that_blocks_do_not_fit_are_refused_where_blocks_are_used() -> None:
    odd = model(intermediate_size=2896)
    section = ProductsSection(experts="fp8")
    machine = Machine(compute_capability=(10, 0), torch_build="2.11", torch_has_flash=True)
    with pytest.raises(ConfigError, match=r"down_proj has 2896 inputs.*Give scaling: rows"):
        choose_products(section, odd, GPU, torch.bfloat16, machine)
    assert choose_products(section, odd, torch.device("cpu"), torch.bfloat16) is not None
    blocks = ProductsSection(experts="fp8", scaling="blocks")
    assert "down_proj has 2896 inputs" in products_problems(blocks, odd)[0]


def test_layers_at_both_ends_are_left_out() -> None:
    assert eight_bit_layers(ProductsSection(experts="fp8"), 24) == range(1, 23)
    section = ProductsSection(experts="fp8", bf16_layers=(2, 0))
    assert eight_bit_layers(section, 24) == range(2, 24)
    assert len(eight_bit_layers(ProductsSection(), 24)) == 0


def test_section_that_leaves_no_layer_is_refused() -> None:
    section = ProductsSection(experts="fp8", bf16_layers=(12, 12))
    (problem,) = products_problems(section, model())
    assert "bf16_layers is [12, 12], but the model has 24 layers" in problem
    assert products_problems(ProductsSection(experts="fp8", bf16_layers=(12, 11)), model()) == []


def test_matrices_of_a_layer_are_those_of_the_model() -> None:
    """Sizes are the model's own, so that what counts them counts what runs."""
    from cpt.model.parameters import parameter_shapes

    shapes = parameter_shapes(model())
    for matrix in eight_bit_matrices(BOTH, model()):
        if matrix.of_experts:
            shape = shapes[f"model.layers.3.mlp.experts.{matrix.name}"]
            assert shape[1:] == (matrix.inputs, matrix.outputs)
        else:
            shape = shapes[f"model.layers.3.self_attn.{matrix.name}.weight"]
            assert shape == (matrix.outputs, matrix.inputs)
    assert len(eight_bit_matrices(BOTH, model())) == 6
    assert len(eight_bit_matrices(ProductsSection(experts="fp8"), model())) == 2

"""A wrong 8-bit product is refused before it trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GptOssConfig

from cpt.config.precision_sections import ProductsSection
from cpt.errors import ConfigError
from cpt.model.configuration import PRESETS
from cpt.model.products import recipe, scaled
from cpt.model.products.layers import ChosenProducts, eight_bit_matrices
from cpt.model.products.probe import ProductError, run_probe
from cpt.model.products.recipe import EightBit

MODEL = GptOssConfig(**PRESETS["tiny"])
CPU = torch.device("cpu")
both_scalings = pytest.mark.parametrize("scaling", ["rows", "blocks"])


def probe(eight_bit: EightBit, dtype: torch.dtype = torch.bfloat16) -> tuple[ProductError, ...]:
    section = ProductsSection(experts="fp8", attention="fp8")
    chosen = ChosenProducts(experts=eight_bit, attention=eight_bit, layers=range(1, 3))
    return run_probe(chosen, eight_bit_matrices(section, MODEL), CPU, dtype)


@both_scalings
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_emulation_passes_with_the_error_that_rounding_costs(
    scaling: Any, dtype: torch.dtype
) -> None:
    findings = probe(EightBit(scaling), dtype)
    assert len(findings) == 12
    for finding in findings:
        assert finding.to_definition <= finding.limit
        assert 0.02 < finding.to_exact < 0.05


def exact(rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor, _: str) -> torch.Tensor:
    """A kernel that rounds nothing."""
    return torch._grouped_mm(rows, matrices, offs=ends)


def shifted(rows: torch.Tensor, matrices: torch.Tensor, ends: torch.Tensor, s: Any) -> torch.Tensor:
    """A kernel that takes the scale of the row before."""
    first, last = EightBit(s).left(rows), EightBit(s).right(matrices)
    factors = (rows.abs().amax(1, keepdim=True).log2().floor()).exp2()
    return torch._grouped_mm(first / factors * factors.roll(1, 0), last, offs=ends)


def failing(*_: Any) -> torch.Tensor:
    raise NotImplementedError("mxfp8_mxfp8 grouped gemm requires compile with USE_MSLK")


@pytest.mark.parametrize("kernel", [exact, shifted], ids=lambda kernel: kernel.__name__)
@both_scalings
def test_kernel_that_computes_something_else_is_refused(
    kernel: Callable[..., torch.Tensor], scaling: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scaled, "grouped_product", kernel)
    monkeypatch.setattr(
        scaled, "linear_product", lambda rows, weight, s: EightBit(s).linear_product(rows, weight)
    )
    with pytest.raises(ConfigError, match="gate_up_proj, forward: off by") as caught:
        probe(EightBit(scaling, by_kernel=True))
    lines = str(caught.value).splitlines()
    assert [line.endswith("!") for line in lines[1:13]] == [True] * 4 + [False] * 8


def test_definition_that_is_wrong_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides of the first comparison would have the same error."""
    right = recipe.rounded

    def coarse(values: torch.Tensor, dim: int, scaling: Any) -> torch.Tensor:
        return right(values, dim, scaling) * 1.1

    monkeypatch.setattr(recipe, "rounded", coarse)
    monkeypatch.setattr("cpt.model.products.probe.rounded", coarse)
    with pytest.raises(ConfigError, match="from the exact product"):
        probe(EightBit("rows"))


def test_kernel_that_does_not_run_is_refused_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(scaled, "grouped_product", failing)
    with pytest.raises(ConfigError, match=r"do not run on cpu.*USE_MSLK"):
        probe(EightBit("blocks", by_kernel=True))

"""Stages about 8-bit products: each kernel beside its emulation, and the expert layer beside bf16.

In a process of their own: a kernel that fails may leave its process without a GPU.
"""

from __future__ import annotations

import functools
from typing import Any, Literal, get_args

import torch
from transformers import GptOssConfig

from cpt.config.precision_sections import ProductsSection
from cpt.model.configuration import PRESETS
from cpt.model.kernels.e4m3 import encode_columns, encode_rows
from cpt.model.products.choice import choose_products
from cpt.model.products.e4m3 import Scaling, encode
from cpt.model.products.layers import ChosenProducts, eight_bit_matrices
from cpt.model.products.probe import measure
from cpt.model.products.recipe import EightBit
from gpu.stages import Options, Planned, milliseconds, relative_error
from gpu.stages_kernels import BF16, ExpertCase

SCALINGS: tuple[Scaling, ...] = get_args(Scaling)
LARGEST_ERROR = 1e-2
"""Relative l2 error of a kernel against its emulation, whose operands are the same."""


def section_of(scaling: Literal["rows", "blocks"]) -> ProductsSection:
    """Return a section that asks for everything."""
    return ProductsSection(experts="fp8", attention="fp8", scaling=scaling)


def model_of(options: Options) -> GptOssConfig:
    """Return the architecture."""
    return GptOssConfig(**PRESETS["tiny" if options.tiny else "gpt-oss-20b"])


def chosen_for(options: Options, scaling: Scaling) -> ChosenProducts:
    """Return what a run would use on this device."""
    chosen = choose_products(section_of(scaling), model_of(options), options.device, BF16)
    assert chosen is not None
    return chosen


def operands_round_alike(options: Options) -> dict[str, Any]:
    """Compare the kernels that round to E4M3 with the definition, in bits and in time."""
    found: dict[str, Any] = {}
    rows = torch.randn(options.size(32768, 64), options.size(2880, 64), device=options.device)
    shape = options.size(32, 2), options.size(2880, 64), options.size(5760, 96)
    operands = {
        "rows": (encode_rows, rows.to(BF16)),
        "columns": (encode_columns, torch.randn(shape, device=options.device).to(BF16)),
    }
    for scaling in SCALINGS:
        for name, (operator, values) in operands.items():
            run = functools.partial(operator, values, scaling == "blocks")
            codes, scales = run()
            part = slice(0, 2)
            expected = encode(values[part], 1, scaling)
            if name == "columns":
                expected = expected[0].view(torch.uint8).mT, expected[1].mT
            same_codes = torch.equal(codes[part].view(torch.uint8), expected[0].view(torch.uint8))
            kernel_ms = milliseconds(run, options)
            found[f"{name}, {scaling}"] = {
                "same bits": same_codes and torch.equal(scales[part], expected[1]),
                "ms": kernel_ms,
                "TB_s": 1.5 * values.nbytes / kernel_ms / 1e9,
            }
    return found


def products_are_right(options: Options) -> dict[str, Any]:
    """Make the comparison of the start-up probe with every kernel that runs here."""
    found: dict[str, Any] = {}
    for scaling in SCALINGS:
        chosen = chosen_for(options, scaling)
        matrices = eight_bit_matrices(section_of(scaling), model_of(options))
        found[f"{scaling}: emulated because"] = dict(chosen.why_emulated)
        try:
            errors = list(measure(chosen, matrices, options.device, BF16))
        except Exception as error:
            found[scaling] = f"FAILED {type(error).__name__}: {error}"[:500]
            continue
        for error in errors:
            found[f"{scaling}, {error.case}"] = {
                "passed": error.passed,
                "to definition": error.to_definition,
                "to exact": error.to_exact,
            }
    return found


def experts_in_eight_bits(options: Options) -> dict[str, Any]:
    """Hold one expert layer to its emulation, and time it beside bf16: 8k tokens, top 4."""
    case = ExpertCase(options, experts=options.size(32, 4), tokens=options.size(8192, 64))
    found: dict[str, Any] = {"bf16_ms": _timed(case, None, options)}
    for scaling in SCALINGS:
        chosen = chosen_for(options, scaling).experts
        assert chosen is not None
        if not chosen.by_kernel:
            found[scaling] = "not here: emulated"
            continue
        try:
            found[scaling] = _beside_emulation(case, chosen, found["bf16_ms"], options)
        except Exception as error:
            found[scaling] = f"FAILED {type(error).__name__}: {error}"[:500]
    emulated = EightBit("rows")
    found["emulated_ms"] = _timed(case, emulated, options)
    return found


def _beside_emulation(
    case: ExpertCase, eight_bit: EightBit, bf16_ms: float, options: Options
) -> dict[str, Any]:
    case.layer.eight_bit = eight_bit
    got = case.solve(BF16, grouped=True)
    case.layer.eight_bit = EightBit(eight_bit.scaling)
    want = case.solve(BF16, grouped=True)
    errors = {name: relative_error(got[name], want[name]) for name in want}
    kernel_ms = _timed(case, eight_bit, options)
    return {
        "passed": max(errors.values()) <= LARGEST_ERROR,
        "errors against the emulation": errors,
        "ms": kernel_ms,
        "times as fast as bf16": bf16_ms / kernel_ms,
    }


def _timed(case: ExpertCase, eight_bit: EightBit | None, options: Options) -> float:
    """Return the time of a forward and a backward of the layer."""
    case.layer.eight_bit = eight_bit
    rows = case.rows.detach().clone().requires_grad_()
    weights = case.weights.detach().clone().requires_grad_()

    def both() -> None:
        case.layer(rows, weights, case.groups).backward(case.d_out)

    return milliseconds(both, options)


STAGES = (
    Planned(operands_round_alike, 10),
    Planned(products_are_right, 10),
    Planned(experts_in_eight_bits, 15),
)

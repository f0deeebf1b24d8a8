"""The run YAML's `train.quantize` and `train.products`: what training rounds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from cpt.config.unused_keys import unused_keys

ExponentRule = Literal["floor", "ceil", "least"]
"""How the exponent of an MXFP4 block is chosen; see cpt/model/weights/mxfp4.py."""
BLOCK = 32
"""Consecutive inputs of one output that share an exponent in MXFP4."""


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeSection:
    """The `train.quantize` section: training that is aware of the format it will be served in."""

    experts: Literal["none", "mxfp4"] = "none"
    """mxfp4 keeps the working weights of the experts' matrices at values that MXFP4 has: after each
    update they are the rounded master weights, which stay in fp32. `cpt export --format mxfp4` then
    writes the trained model, bit for bit."""
    start_step: int | None = None
    """Optimizer steps before the weights are rounded for the first time; it must be given with
    `experts: mxfp4`. 0 rounds from the start, which is right for a run that goes on from a trained
    one."""
    exponent: ExponentRule = "floor"
    """How the exponent of a block of 32 weights is chosen: floor of its largest, as the format's
    specification has it, ceil so that nothing is clipped, or least of both in squared error. An
    export of the run uses the same."""

    @property
    def is_on(self) -> bool:
        """Whether the experts are rounded in this run, from some step on."""
        return self.experts != "none"

    def is_on_after(self, step: int) -> bool:
        """Return whether the working weights are rounded once `step` optimizer steps are done."""
        return self.is_on and self.start_step is not None and step >= self.start_step

    def state_after(self, step: int) -> dict[str, str] | None:
        """Return what a checkpoint of a step tells of the rounding; None if nothing is rounded."""
        return {"exponent": self.exponent} if self.is_on_after(step) else None

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield (key, message) of what is wrong in the section alone."""
        if self.start_step is not None and self.start_step < 0:
            yield "start_step", f"is {self.start_step}, must be >= 0."
        if self.is_on and self.start_step is None:
            yield (
                "start_step",
                "is not given: from which step on are the experts rounded? Give about two thirds "
                "of train.total_steps, or 0 for a run that goes on from a trained model.",
            )
        told = "experts: none, so nothing is rounded. Remove it."
        yield from unused_keys(self, self.is_on, told)


@dataclass(frozen=True, kw_only=True, slots=True)
class ProductsSection:
    """The `train.products` section: which matrix products are computed in 8 bits."""

    experts: Literal["bf16", "fp8"] = "bf16"
    """fp8 computes the experts' products with their weights, forward and for the gradient of the
    inputs, in E4M3; gradients of weights stay in the working precision."""
    attention: Literal["bf16", "fp8"] = "bf16"
    """The same for the four projections of attention."""
    scaling: Literal["auto", "rows", "blocks"] = "auto"
    """What shares one power-of-two scale: rows of the two operands, or blocks of 32 values along
    the sum (MXFP8). auto takes blocks on Blackwell, and rows elsewhere."""
    bf16_layers: tuple[int, ...] = (1, 1)
    """Layers at the beginning and at the end whose products stay in the working precision."""

    @property
    def is_on(self) -> bool:
        """Whether any product is computed in 8 bits."""
        return "fp8" in (self.experts, self.attention)

    def check(self) -> Iterator[tuple[str, str]]:
        """Yield (key, message) of what is wrong in the section alone."""
        if len(self.bf16_layers) != 2 or min(self.bf16_layers) < 0:
            yield (
                "bf16_layers",
                f"is {list(self.bf16_layers)}, must be two numbers >= 0: the layers at the "
                "beginning and at the end, such as [1, 1].",
            )
        told = "experts and attention are bf16, so there are no products in 8 bits. Remove it."
        yield from unused_keys(self, self.is_on, told)

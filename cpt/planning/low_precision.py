"""What `train.quantize` and `train.products` add to a step: its time, and the memory of a rank.

    rounding   after each update, the working weights of the experts' matrices are read and written
               once; where they are offloaded, they travel to the device and back, piece by piece
    products   forward, recomputed and for the gradient of the input at the speed of 8 bits, those
               for gradients of weights as before; weights are read in 8 bits
    operands   both operands of such a product are read, and written in 8 bits, each time

8-bit products are taken to reach the share of the data sheet's rate that bf16 products reach.  None
of this was measured on a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from transformers import GptOssConfig

from cpt.config import RunConfig
from cpt.config.precision_sections import ProductsSection
from cpt.config.sections import TrainSection
from cpt.model.products import e4m3
from cpt.model.products.layers import EightBitMatrix, eight_bit_layers, eight_bit_matrices
from cpt.model.weights import mxfp4
from cpt.model.weights.mxfp4_rounding import BYTES_OF_A_VALUE, PIECE_VALUES
from cpt.planning.hardware import Gpu
from cpt.planning.step_work import Share, Work
from cpt.planning.trained_weights import TrainedShares
from cpt.storage.state_bytes import BF16_BYTES, FP32_BYTES

OPERANDS = "8-bit operands"
"""The part of a plan, in time and in memory."""
PASSES_OF_A_MATRIX = ("forward", "recompute", "backward")
"""Passes with products in 8 bits; in the backward, gradients of weights are not."""
LAUNCHES = 2
"""Kernels for the operands of a product."""
TRAVELING_VALUES = 1 << 22
"""Offloaded weights that are on the device at a time (LARGEST_PIECE in cpt/deepspeed_adapter)."""
CODE_BYTES = 1


def rounded_weights(config: RunConfig, expert_matrices: tuple[int, ...]) -> int:
    """Return the weights that a rank rounds after each update, once rounding has begun.

    Args:
        config: The run.
        expert_matrices: The sizes of the trained expert matrices of the whole model.
    """
    if not config.train.quantize.is_on:
        return 0
    # ZeRO-3 rounds the part of a rank, the other stages all matrices that the rank computes with
    ranks = config.world_size if config.zero_stage == 3 else config.ep_size
    return sum(expert_matrices) // ranks


def rounding_bytes(config: RunConfig, expert_matrices: tuple[int, ...]) -> int:
    """Return the bytes of a rank that rounding reads and writes after an update."""
    return 2 * config.itemsize * rounded_weights(config, expert_matrices)


def rounds_on_host(config: RunConfig) -> bool:
    """Return whether the rounded weights lie on the host, in its memory or in files."""
    return "offload_param" in config.engine_json["zero_optimization"]


def rounding_seconds(config: RunConfig, expert_matrices: tuple[int, ...], gpu: Gpu) -> float:
    """Return the time of rounding after an update."""
    moved = rounding_bytes(config, expert_matrices)
    if rounds_on_host(config):
        # a piece goes to the device, is rounded, and comes back before the next one
        return moved / gpu.pcie_bytes_per_second
    return moved / gpu.attainable().memory_bytes_per_second


def rounding_memory(config: RunConfig, model: GptOssConfig, device_type: str) -> int:
    """Return the bytes on the device that rounding takes beside the weights."""
    if not config.train.quantize.is_on:
        return 0
    column = mxfp4.BLOCK * max(model.hidden_size, 2 * model.intermediate_size)
    if device_type == "cpu":
        return BYTES_OF_A_VALUE * max(PIECE_VALUES, column)
    return config.itemsize * TRAVELING_VALUES if rounds_on_host(config) else 0


@dataclass(frozen=True, kw_only=True, slots=True)
class EightBitWork:
    """Which products of a model are in 8 bits, and what their operands cost."""

    matrices: tuple[EightBitMatrix, ...]
    """Those of a layer."""
    layers: int
    """Layers that have such products."""
    all_layers: int
    """Layers of the model."""
    experts: int
    """Experts of the model."""
    experts_per_token: int
    trained: TrainedShares
    """The weights that have gradients."""

    @classmethod
    def of(cls, config: RunConfig, model: GptOssConfig) -> EightBitWork | None:
        """Return the 8-bit products of a run; None without any."""
        section = config.train.products
        layers = len(eight_bit_layers(section, model.num_hidden_layers))
        if not layers:
            return None
        return cls(
            matrices=eight_bit_matrices(section, model),
            layers=layers,
            all_layers=model.num_hidden_layers,
            experts=model.num_local_experts,
            experts_per_token=model.num_experts_per_tok,
            trained=TrainedShares.of(config, model),
        )

    def changed(
        self, works: dict[str, dict[str, Work]], share: Share
    ) -> dict[str, dict[str, Work]]:
        """Return the work of a micro step with 8-bit products, from that without any."""
        changed = dict(works)
        parts = (
            ("experts", True, self.trained.experts),
            ("attention projections", False, self.trained.attention),
        )
        for part, of_experts, trained in parts:
            if any(matrix.of_experts == of_experts for matrix in self.matrices):
                changed[part] = {}
                for name, work in works[part].items():
                    changed[part][name] = _in_eight_bits(work, self._share_of(name, trained))
        changed[OPERANDS] = {name: self._of_operands(name, share) for name in PASSES_OF_A_MATRIX}
        return changed

    def _share_of(self, name: str, trained: float) -> float:
        """Return the share of the products of a pass, over all layers, that are in 8 bits.

        Args:
            name: The pass.
            trained: Share of the weights that have gradients, whose products are not in 8 bits.
        """
        share = 1 / (1 + trained) if name == "backward" else 1.0
        return share * self.layers / self.all_layers

    def _of_operands(self, name: str, share: Share) -> Work:
        """Return the work of rounding both operands of every 8-bit product of a pass."""
        values = 0.0
        launches = 0
        for matrix in self.matrices:
            if name == "recompute" and matrix.name == "down_proj":
                continue  # its output is not needed again
            launches += LAUNCHES
            width = matrix.outputs if name == "backward" else matrix.inputs
            weights = float(matrix.inputs * matrix.outputs)
            rows = float(share.tokens)
            if matrix.of_experts:
                rows *= self.experts_per_token * share.imbalance
                weights *= self.experts / share.ep_size
            values += rows * width + weights
        return Work(
            launches=self.layers * launches,
            flops=0.0,
            window_flops=0.0,
            product_bytes=0.0,
            weight_bytes=0.0,
            other_bytes=self.layers * values * (BF16_BYTES + CODE_BYTES),
        )


def _in_eight_bits(work: Work, share: float) -> Work:
    """Return the work of products of which a share is in 8 bits; bytes of rows stay as they are."""
    saved = share * (1 - CODE_BYTES / BF16_BYTES) * work.weight_bytes
    return replace(
        work,
        eight_bit_flops=share * work.flops,
        product_bytes=work.product_bytes - saved,
        weight_bytes=work.weight_bytes - saved,
    )


def operands_memory(
    config: RunConfig, model: GptOssConfig, tokens: int, moment: str, device_type: str
) -> int:
    """Return the bytes of the two rounded operands of a product, at a moment of the backward.

    Args:
        config: The run.
        model: Sizes of the model.
        tokens: Tokens of a micro step on this rank.
        moment: `experts`, `rows` or `attention` (cpt/planning/step_memory.py).
        device_type: A CPU emulates: it keeps values in the working precision.
    """
    names = {"experts": ("down_proj",), "rows": ("gate_up_proj",)}.get(moment, ("q_proj", "o_proj"))
    largest = 0
    for matrix in eight_bit_matrices(config.train.products, model):
        if matrix.name not in names:
            continue
        rows, matrices = tokens, 1
        if matrix.of_experts:
            rows *= model.num_experts_per_tok
            matrices = model.num_local_experts // config.ep_size
        rows_values = rows * matrix.outputs
        weights = matrices * matrix.inputs * matrix.outputs
        if device_type == "cpu":
            piece = min(e4m3.PIECE_VALUES, max(rows_values, weights))
            size = config.itemsize * (rows_values + weights) + e4m3.BYTES_OF_A_VALUE * piece
        else:
            scales = rows + matrices * matrix.inputs
            size = CODE_BYTES * (rows_values + weights) + FP32_BYTES * scales
        largest = max(largest, size)
    return largest


def products_problem(section: ProductsSection, gpu: Gpu) -> str | None:
    """Return why a kind of GPU has no products of `train.products`; None if it has them."""
    if not section.is_on or gpu.fp8_flops is not None:
        return None
    return (
        f"train.products asks for fp8, but {gpu.name} has no products in 8 bits. Remove "
        "train.products, or take a GPU that has them, such as an H100."
    )


def emulation_problem(section: ProductsSection, gpu: Gpu) -> str | None:
    """Return why a plan cannot count the products of `train.products` on a kind of GPU."""
    if section.experts != "fp8" or gpu.fp8_flops is None or gpu.has_grouped_fp8:
        return None
    return (
        f"train.products.experts is fp8, but torch has no grouped products in 8 bits for "
        f"{gpu.name}: they would be emulated, which is slower than bf16 and is not counted by a "
        "plan. Give experts: bf16, or plan with another GPU, such as h100."
    )


def rounding_text(config: RunConfig, expert_matrices: tuple[int, ...]) -> str:
    """Return what a rank rounds after each update, for people."""
    quantize = config.train.quantize
    if not quantize.is_on:
        return "nothing"
    weights = rounded_weights(config, expert_matrices)
    moved = rounding_bytes(config, expert_matrices) / 1e9
    how = f"{moved:.2f} GB read and written"
    if rounds_on_host(config):
        how = f"{moved:.2f} GB between host and device"
    text = (
        f"experts to {quantize.experts} ({quantize.exponent}) from step {quantize.start_step} on: "
        f"{weights / 1e6:,.1f} M weights of a rank after each update, {how}"
    )
    stop = config.train.stop_at_step
    if stop is not None and stop <= (quantize.start_step or 0):
        text += f"; this start does no such step, as it ends with train.stop_at_step {stop}"
    return text


def products_text(config: RunConfig, model: GptOssConfig) -> str:
    """Return which products are in 8 bits, for people."""
    section = config.train.products
    layers = eight_bit_layers(section, model.num_hidden_layers)
    if not layers:
        return "none"
    names = [matrix.name for matrix in eight_bit_matrices(section, model)]
    last = layers.stop - 1
    return f"{', '.join(names)} of layers {layers.start} to {last} (not measured on a GPU)"


def assumption_lines(train: TrainSection, gpu: Gpu) -> list[str]:
    """Return what a plan assumes of Muon, rounding and 8-bit products, if a run has any."""
    lines = []
    if train.optimizer == "muon":
        lines.append(
            f"Muon: {train.muon.newton_schulz_steps} Newton-Schulz steps at the speed of other "
            "bf16 products, and exchanges that nothing hides (from operations and bytes)"
        )
    if train.quantize.is_on:
        lines.append(
            "rounding: the experts of a rank are read and written once after each update, from "
            "train.quantize.start_step on (from bytes and bandwidth, not measured)"
        )
    if train.products.is_on and gpu.fp8_flops is not None:
        rate = gpu.fp8_flops / 1e12
        lines.append(
            f"products in 8 bits: {rate:.0f} TFLOP/s dense FP8 (data sheet), reached as bf16's "
            "peak is; operands are rounded in one pass by kernels (not measured on a GPU)"
        )
    return lines

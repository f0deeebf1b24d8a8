"""What adapters change in the work of a micro step: weights without gradients, and more products.

    frozen     the backward of a product has no gradient of the weight: a half of its work, of the
               loss head's, which computes the logits again, a third
    adapters   per row and adapted matrix the products with A and B and the sum, in each pass; bytes
               are those of rows, since A and B are small
    decoding   over a packed base: in each pass the codes are read and the values written

The last two are counted from shapes and were not measured.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import GptOssConfig

from cpt.config import RunConfig
from cpt.model.adapters.layout import AdaptedMatrix
from cpt.model.experts.packed import packed_bytes
from cpt.planning.step_work import Share, Work

ADAPTERS = "adapters"
DECODING = "decoding"
KEPT_BY_BACKWARD = {
    "experts": 1 / 2,
    "attention projections": 1 / 2,
    "router": 1 / 2,
    "loss head": 2 / 3,
}
"""The share of a backward's products that is left without the gradient of the weight."""
LAUNCHES = {"forward": 3, "recompute": 3, "backward": 8}
"""Kernels of an adapted matrix in each pass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterWork:
    """What one token of a rank costs beside the weights that stay as they are."""

    row_values: tuple[tuple[str, float], ...]
    """Values of rows that are read and written for a token, by pass, over all layers."""
    flops: tuple[tuple[str, float], ...]
    """FLOPs of a token, by pass."""
    matrices: int
    """Adapted matrices."""
    layers: int
    """Layers of the model."""
    packed: float
    """Packed weights of this rank."""
    itemsize: int
    """Bytes of a number in the working precision."""

    @classmethod
    def of(
        cls,
        config: RunConfig,
        model: GptOssConfig,
        matrices: Sequence[AdaptedMatrix],
        packed: int,
    ) -> AdapterWork | None:
        """Return the work of a run's adapters; None without adapters.

        Args:
            config: The run.
            model: Sizes of the model.
            matrices: The matrices that have an adapter.
            packed: Packed weights of the whole model.
        """
        if not matrices:
            return None
        values = dict.fromkeys(LAUNCHES, 0.0)
        flops = dict.fromkeys(LAUNCHES, 0.0)
        for matrix in matrices:
            rows = model.num_experts_per_tok if matrix.of_experts else 1
            # A reads what goes in; B writes its part, which is added to what comes out
            forward = rows * (matrix.in_size + 4 * matrix.out_size)
            products = rows * 2.0 * matrix.rank * (matrix.in_size + matrix.out_size)
            values["forward"] += forward
            flops["forward"] += products
            if not matrix.name.endswith("down_proj"):  # its output is not needed again
                values["recompute"] += forward
                flops["recompute"] += products
            # x A again and the gradients of A and B; that of the rows is made and added
            values["backward"] += rows * (6 * matrix.in_size + 2 * matrix.out_size)
            flops["backward"] += 2.5 * products
        return cls(
            row_values=tuple(values.items()),
            flops=tuple(flops.items()),
            matrices=len(matrices),
            layers=model.num_hidden_layers,
            packed=packed / config.ep_size,
            itemsize=config.itemsize,
        )

    def changed(
        self, works: dict[str, dict[str, Work]], share: Share
    ) -> dict[str, dict[str, Work]]:
        """Return the work of a micro step with adapters, from that of training all weights."""
        changed = {}
        for part, by_pass in works.items():
            changed[part] = dict(by_pass)
            kept = KEPT_BY_BACKWARD.get(part)
            if kept is not None:
                changed[part]["backward"] = _without_weight_gradients(by_pass["backward"], kept)
        changed[ADAPTERS] = self._of_adapters(share)
        if self.packed:
            changed[DECODING] = self._of_decoding()
        return changed

    def _of_adapters(self, share: Share) -> dict[str, Work]:
        flops = dict(self.flops)
        works = {}
        for name, values in self.row_values:
            works[name] = Work(
                launches=LAUNCHES[name] * self.matrices,
                flops=share.tokens * share.imbalance * flops[name],
                window_flops=0.0,
                product_bytes=0.0,
                weight_bytes=0.0,
                other_bytes=share.tokens * share.imbalance * values * self.itemsize,
            )
        return works

    def _of_decoding(self) -> dict[str, Work]:
        launches = 2.0 * self.layers
        moved = packed_bytes(int(self.packed)) + self.itemsize * self.packed
        work = Work(
            launches=launches,
            flops=0.0,
            window_flops=0.0,
            product_bytes=0.0,
            weight_bytes=0.0,
            other_bytes=moved,
        )
        # two thirds of the weights are in the first matrices, the only ones that are needed again
        again = replace(work, launches=launches / 2, other_bytes=2 / 3 * moved)
        return {"forward": work, "recompute": again, "backward": work}


def _without_weight_gradients(work: Work, kept: float) -> Work:
    return replace(
        work,
        flops=kept * work.flops,
        product_bytes=kept * work.product_bytes,
        weight_bytes=kept * work.weight_bytes,
    )

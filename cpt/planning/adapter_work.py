"""What adapters add to the work of a micro step.

    adapters   per row and adapted matrix the products with A and B and the sum, in each pass; bytes
               are those of rows, since A and B are small
    decoding   over a packed base: in each pass the codes are read and the values written

Both are counted from shapes and were not measured. That the weights below have no gradients is
counted by cpt/planning/frozen_work.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from transformers import GptOssConfig

from cpt.config import RunConfig
from cpt.model.adapters.layout import AdaptedMatrix
from cpt.model.experts.packed import packed_bytes
from cpt.planning.step_work import Share, Work

ADAPTERS = "adapters"
DECODING = "decoding"
LAUNCHES = {"forward": 3, "recompute": 3, "backward": 8}
"""Kernels of an adapted matrix in each pass."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenWork:
    """What one token costs in the adapters of one kind, over all layers, by pass."""

    row_values: tuple[float, ...]
    """Values of rows that are read and written, in the order of LAUNCHES."""
    flops: tuple[float, ...]
    """FLOPs of products, likewise."""

    @classmethod
    def of(cls, matrices: Iterable[AdaptedMatrix], rows: int) -> TokenWork:
        """Return the work of adapters beside matrices of which each takes `rows` rows a token."""
        values = dict.fromkeys(LAUNCHES, 0.0)
        flops = dict.fromkeys(LAUNCHES, 0.0)
        for matrix in matrices:
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
        return cls(row_values=tuple(values.values()), flops=tuple(flops.values()))


@dataclass(frozen=True, kw_only=True, slots=True)
class AdapterWork:
    """What one token of a rank costs beside the weights that stay as they are."""

    of_attention: TokenWork
    """Beside attention; each rank has as many tokens."""
    of_experts: TokenWork
    """Beside experts, whose busiest rank has more rows than the mean."""
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
        return cls(
            of_attention=TokenWork.of([one for one in matrices if not one.of_experts], 1),
            of_experts=TokenWork.of(
                [one for one in matrices if one.of_experts], model.num_experts_per_tok
            ),
            matrices=len(matrices),
            layers=model.num_hidden_layers,
            packed=packed / config.ep_size,
            itemsize=config.itemsize,
        )

    def changed(
        self, works: dict[str, dict[str, Work]], share: Share
    ) -> dict[str, dict[str, Work]]:
        """Return the work of a micro step with adapters, from that without them."""
        changed = dict(works)
        changed[ADAPTERS] = self._of_adapters(share)
        if self.packed:
            changed[DECODING] = self._of_decoding()
        return changed

    def _of_adapters(self, share: Share) -> dict[str, Work]:
        dense = self.of_attention
        experts = self.of_experts
        works = {}
        for index, (name, launches) in enumerate(LAUNCHES.items()):
            flops = dense.flops[index] + share.imbalance * experts.flops[index]
            values = dense.row_values[index] + share.imbalance * experts.row_values[index]
            works[name] = Work(
                launches=launches * self.matrices,
                flops=share.tokens * flops,
                window_flops=0.0,
                product_bytes=0.0,
                weight_bytes=0.0,
                other_bytes=share.tokens * values * self.itemsize,
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

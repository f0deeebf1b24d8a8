"""The time that a GPU needs for each part of a step, from its work and the attainable rates.

    products   FLOPs over the speed that products reach, or their bytes over the bandwidth,
               whichever is longer; a grouped product also waits for a share of its weights
    the rest   bytes over the bandwidth, one kernel after another
    launches   the time by which the host, which starts every kernel, is slower than the device

Nothing else is lost: no gap between kernels, no wait of the host for the device.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

from cpt.planning.adapter_work import ADAPTERS, DECODING, AdapterWork
from cpt.planning.frozen_work import with_gradients_of
from cpt.planning.hardware import Attainable
from cpt.planning.low_precision import OPERANDS, EightBitWork
from cpt.planning.step_work import ModelSizes, Share, Work, work_of_micro_step
from cpt.planning.trained_weights import ALL, TrainedShares

OTHER = "embedding, residuals, bookkeeping"
NAMES = {
    "attention core": "attention core",
    "attention projections": "projections",
    "attention exchange": "exchanges, packing",
    "loss head": "loss head",
    "norms": "norms",
    "rope": "rope",
    "dispatch": "dispatch",
    "router": "router",
    ADAPTERS: "adapters",
    DECODING: "experts: decoding",
    OPERANDS: OPERANDS,
}
"""Names of a plan for parts of the table; `experts` are two parts here, the rest is OTHER."""
PRODUCTS = "experts: products"
REST = "experts: the rest"
LAUNCHES = "launches"
BOOKKEEPING = "ZeRO bookkeeping"
PARTS = (
    PRODUCTS,
    REST,
    "experts: decoding",
    OPERANDS,
    "adapters",
    "loss head",
    "attention core",
    "projections",
    "norms",
    "rope",
    "dispatch",
    "router",
    "exchanges, packing",
    OTHER,
    BOOKKEEPING,
    LAUNCHES,
)
"""The parts of computing in the order in which they are printed."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """The parameters that one rank computes with and owns."""

    computed_with: float
    """Parameters whose gradient this rank computes."""
    gathered: float
    """Parameters that it gathers from other ranks before it computes with them."""
    owned: float
    """Parameters whose state this rank holds."""


GATHERED_BYTES = 8
"""Bytes that DeepSpeed moves per gathered parameter and micro step: two gathers, each of which
copies the weights out of one buffer (AllGatherCoalescedHandle.wait).
"""
REDUCED_BYTES = 4
"""Bytes per gradient that a rank computes: it is divided by the number of ranks in place
(reduce_scatter_coalesced). The collective itself counts as traffic.
"""
ADDED_BYTES = 18
"""Bytes per owned gradient and micro step: it becomes fp32 and is added to the sum
(stage3.py: __avg_scatter_grads, partition_grads).
"""
UPDATE_BYTES = 54
"""Bytes per owned parameter and step (stage3.py: step): the norm of the gradient 4, a flat copy of
it 8, clipping 8, AdamW 28, the bf16 weight 6.
"""


def micro_step_parts(
    model: ModelSizes,
    share: Share,
    held: Held,
    passes: tuple[str, ...],
    rates: Attainable,
    trained: TrainedShares = ALL,
    adapters: AdapterWork | None = None,
    eight_bit: EightBitWork | None = None,
) -> dict[str, float]:
    """Return the seconds of one micro step by part, in the order of PARTS.

    Args:
        model: Sizes of the model.
        share: What this rank computes.
        held: The parameters that it computes with and owns.
        passes: The passes of a layer that are made.
        rates: What the GPU attains.
        trained: The weights that have gradients.
        adapters: The adapters that are trained in place of the model.
        eight_bit: The products that are in 8 bits.
    """
    seconds, launches = _computing(model, share, passes, rates, trained, adapters, eight_bit)
    moved = GATHERED_BYTES * held.gathered + REDUCED_BYTES * held.computed_with
    moved += ADDED_BYTES * held.owned
    parts = {**seconds, BOOKKEEPING: moved / rates.memory_bytes_per_second}
    host = launches * rates.launch_seconds
    parts[LAUNCHES] = max(0.0, host - sum(parts.values()))
    return {part: parts[part] for part in PARTS if part in parts}


@functools.lru_cache(maxsize=4096)
def _computing(
    model: ModelSizes,
    share: Share,
    passes: tuple[str, ...],
    rates: Attainable,
    trained: TrainedShares,
    adapters: AdapterWork | None,
    eight_bit: EightBitWork | None,
) -> tuple[dict[str, float], float]:
    """Return the seconds of the model's parts, and the kernels that are started."""
    works = with_gradients_of(trained, work_of_micro_step(model, share))
    if adapters is not None:
        works = adapters.changed(works, share)
    if eight_bit is not None:
        works = eight_bit.changed(works, share)
    seconds: dict[str, float] = {}
    launches = 0.0
    for part, by_pass in works.items():
        for name, work in by_pass.items():
            if name not in passes:
                continue
            launches += work.launches
            products = _product_seconds(part, name, work, rates)
            rest = work.other_bytes / rates.memory_bytes_per_second
            if part == "experts":
                seconds[PRODUCTS] = seconds.get(PRODUCTS, 0.0) + products
                seconds[REST] = seconds.get(REST, 0.0) + rest
            else:
                title = NAMES.get(part, OTHER)
                seconds[title] = seconds.get(title, 0.0) + products + rest
    return seconds, launches


def _product_seconds(part: str, name: str, work: Work, rates: Attainable) -> float:
    """Return the time of the products of a part in one pass."""
    moving = work.product_bytes / rates.memory_bytes_per_second
    if part == "experts":
        weights = work.weight_bytes / rates.memory_bytes_per_second
        flops = work.flops_at(rates.eight_bit_ratio)
        multiplying = flops / rates.grouped_flops + rates.grouped_exposed * weights
    elif part == "attention core" and name == "backward":
        multiplying = work.flops / rates.attention_flops.backward
        multiplying += work.window_flops / rates.window_flops.backward
    elif part == "attention core":
        multiplying = work.flops / rates.attention_flops.forward
        multiplying += work.window_flops / rates.window_flops.forward
    else:
        multiplying = work.flops_at(rates.eight_bit_ratio) / rates.product_flops
    return max(multiplying, moving)

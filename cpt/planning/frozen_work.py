"""What weights without gradients leave out of the work of a micro step.

The backward of a product has no gradient of a weight that is frozen, itself or below adapters: a
half of its work, and a third of the loss head's, which computes the logits again.
"""

from __future__ import annotations

from dataclasses import replace

from cpt.planning.step_work import Work
from cpt.planning.trained_weights import TrainedShares

HALF = 1 / 2
"""The share of a backward's products that is left without the gradient of the weight."""
HEAD = 2 / 3
"""The same of the loss head."""


def with_gradients_of(
    trained: TrainedShares, works: dict[str, dict[str, Work]]
) -> dict[str, dict[str, Work]]:
    """Return the work of a micro step, from that of training all weights.

    Args:
        trained: The weights that have gradients.
        works: The work by part and pass.
    """
    kept = {
        "experts": HALF + (1 - HALF) * trained.experts,
        "attention projections": HALF + (1 - HALF) * trained.attention,
        "router": HALF + (1 - HALF) * trained.router,
        "loss head": HEAD + (1 - HEAD) * trained.head,
    }
    changed = {}
    for part, by_pass in works.items():
        changed[part] = dict(by_pass)
        if part in kept and kept[part] < 1:
            changed[part]["backward"] = _kept(by_pass["backward"], kept[part])
    return changed


def _kept(work: Work, share: float) -> Work:
    return replace(
        work,
        flops=share * work.flops,
        product_bytes=share * work.product_bytes,
        weight_bytes=share * work.weight_bytes,
    )

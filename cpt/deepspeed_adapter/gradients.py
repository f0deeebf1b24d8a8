"""The gradient norm of this rank's share, and a step without an update.

Read in deepspeed 0.19.8: runtime/zero/stage3.py, runtime/zero/stage_1_and_2.py.
"""

from __future__ import annotations

from typing import Any

import torch

from cpt.deepspeed_adapter.shards import flat_partitions
from cpt.errors import InternalError


def squared_gradient_norm(engine: Any) -> float:
    """This rank's share of the squared global gradient norm: each gradient element is owned by
    exactly one rank.

    Valid between `backward` of the last accumulation step, which has reduced and partitioned the
    gradients, and `step`. NaN or infinity anywhere in the share makes it NaN or infinite.
    """
    zero = engine.optimizer
    if (engine.zero_optimization_stage() == 3 and zero.offload_optimizer) or getattr(
        zero, "cpu_offload", False
    ):
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies to the host run on streams of their own
        gradients = [flat.grad for flat in flat_partitions(engine) if flat.grad is not None]
    else:
        gradients = [
            gradient for group in zero.averaged_gradients.values() for gradient in group or ()
        ]
    if not gradients:
        return 0.0
    norms = [
        torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32) for gradient in gradients
    ]
    return float(torch.stack(norms).double().square().sum())


def discard_gradients(engine: Any) -> None:
    """Finish an optimizer step without an update, on all ranks: gradients are dropped, the engine's
    counters go on.

    DeepSpeed drops gradients by itself if their norm is not finite; here it is told so, whatever
    they are, because the judgement is made before and holds for all ranks.  Neither weights nor
    Adam's state are touched.
    """
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    invalid = torch.full(
        (), -1.0, device=flat_partitions(engine)[0].device
    )  # DeepSpeed's word for not finite
    name, replacement = (
        ("_get_norm_groups", [invalid]) if stage == 3 else ("scaled_global_norm", invalid)
    )
    assert callable(getattr(zero, name)), (
        f"ZeRO-{stage} has no {name}: this is not the DeepSpeed that was read"
    )
    setattr(zero, name, lambda *_, **__: replacement)
    try:
        engine.step()
    finally:
        delattr(zero, name)
    if engine.was_step_applied():
        raise InternalError(
            "DeepSpeed applied an update that was to be dropped; the last checkpoint is intact."
        )

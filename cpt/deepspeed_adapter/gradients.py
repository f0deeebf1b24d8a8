"""The gradient norm of this rank's share, and a step without an update.

Read in deepspeed 0.19.8: runtime/zero/stage3.py, runtime/zero/stage_1_and_2.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cpt.deepspeed_adapter.shards import flat_partitions
from cpt.errors import InternalError


def squared_gradient_norm(engine: Any) -> float:
    """Return this rank's share of the squared global gradient norm.

    Each gradient element is owned by exactly one rank. The result is valid between `backward` of
    the last accumulation step, which has reduced and partitioned the gradients, and `step`. NaN or
    infinity anywhere in the share makes it NaN or infinite.
    """
    gradients = _owned_gradients(engine)
    if not gradients:
        return 0.0
    norms = [
        torch.linalg.vector_norm(gradient.detach(), dtype=torch.float32) for gradient in gradients
    ]
    return float(torch.stack(norms).double().square().sum())


def _owned_gradients(engine: Any) -> list[torch.Tensor]:
    zero = engine.optimizer
    if _is_offloaded(engine):
        if torch.cuda.is_available():
            torch.cuda.synchronize()  # the copies to the host run on streams of their own
        return [flat.grad for flat in flat_partitions(engine) if flat.grad is not None]
    gradients: list[torch.Tensor] = []
    for group in zero.averaged_gradients.values():
        if group is not None:
            gradients.extend(group)
    return gradients


def _is_offloaded(engine: Any) -> bool:
    """Return whether the optimizer state, hence the gradients that Adam reads, is on the host."""
    if engine.zero_optimization_stage() == 3:
        return bool(engine.optimizer.offload_optimizer)
    return bool(engine.optimizer.cpu_offload)


def discard_gradients(engine: Any) -> None:
    """Finish an optimizer step without an update, on all ranks.

    DeepSpeed drops gradients by itself if their norm is not finite. Here it is told so whatever
    they are, because the decision was made before and holds for all ranks. The gradients are
    dropped and the engine's counters go on; neither weights nor Adam's state are touched.
    """
    zero = engine.optimizer
    # DeepSpeed marks a norm that is not finite as -1.
    invalid = torch.full((), -1.0, device=flat_partitions(engine)[0].device)
    if engine.zero_optimization_stage() == 3:
        with _shadowed(zero, "_get_norm_groups", [invalid]):
            engine.step()
    else:
        with _shadowed(zero, "scaled_global_norm", invalid):
            engine.step()
    if engine.was_step_applied():
        raise InternalError(
            "DeepSpeed applied an update that was to be dropped; the last checkpoint is intact."
        )


@contextmanager
def _shadowed(zero: Any, name: str, result: Any) -> Iterator[None]:
    """Let a method of one object return `result` inside the block."""

    def return_result(*_: Any, **__: Any) -> Any:
        return result

    setattr(zero, name, return_result)
    try:
        yield
    finally:
        delattr(zero, name)

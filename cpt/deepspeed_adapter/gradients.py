"""The gradient norm of this rank's share, and the end of a step with an update or without one.

Read in deepspeed 0.19.8: runtime/zero/stage3.py, runtime/zero/stage_1_and_2.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cpt.deepspeed_adapter.shards import flat_partitions
from cpt.errors import InternalError

LARGEST_HOST_SUM = 1 << 24
"""Elements up to which a tensor on the host is one sum in fp32.

A CPU adds the squares of a row in few lanes, one after the other: the norm of 13 million elements
is 0.05 % low, that of 579 million 11 %.
"""
HOST_PART = 1 << 18
"""Elements of one sum in a larger tensor."""
LARGEST_JOINED = 1 << 30
"""Elements up to which neighbors are joined; torch reaches these with 32-bit indices."""


def squared_gradient_norm(engine: Any) -> torch.Tensor:
    """Return this rank's share of the squared global gradient norm, without waiting for it.

    Each gradient element is owned by exactly one rank. The result is valid between `backward` of
    the last accumulation step, which has reduced and partitioned the gradients, and `step`. NaN or
    infinity anywhere in the share makes it NaN or infinite.

    Returns:
        A scalar in fp64, on the device of the gradients.
    """
    norms = []
    for part in _parts(_owned_gradients(engine)):
        norms.append(torch.linalg.vector_norm(part, dtype=torch.float32))
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack(norms).double().square().sum()


def _parts(gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return the same elements in tensors of which each is one sum."""
    detached = [gradient.detach() for gradient in gradients]
    if detached and detached[0].is_cuda:
        return joined(detached)
    parts: list[torch.Tensor] = []
    for gradient in detached:
        if gradient.numel() > LARGEST_HOST_SUM:
            parts.extend(gradient.reshape(-1).split(HOST_PART))
        else:
            parts.append(gradient)
    return parts


def joined(gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return views of the same elements in which neighbors of one buffer are one tensor.

    DeepSpeed keeps gradients as views of flat buffers, one per parameter. On a GPU each sum costs
    two launches and is accurate at any size.
    """
    parts: list[torch.Tensor] = []
    for gradient in gradients:
        numel = gradient.numel()
        if parts:
            numel += parts[-1].numel()
        if parts and numel <= LARGEST_JOINED and _follows(gradient, parts[-1]):
            parts[-1] = parts[-1].as_strided((numel,), (1,))
        elif gradient.is_contiguous():
            parts.append(gradient.view(-1))
        else:
            parts.append(gradient)
    return parts


def _follows(gradient: torch.Tensor, part: torch.Tensor) -> bool:
    """Return whether a gradient begins where a flat part of the same buffer ends."""
    return (
        part.dim() == 1
        and part.is_contiguous()
        and gradient.is_contiguous()
        and gradient.dtype == part.dtype
        and gradient.untyped_storage()._cdata == part.untyped_storage()._cdata
        and gradient.storage_offset() == part.storage_offset() + part.numel()
    )


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


def apply_update(engine: Any, grad_norm: float) -> None:
    """Finish an optimizer step with an update, clipped as the configuration says.

    Args:
        engine: The DeepSpeed engine.
        grad_norm: The global gradient norm.

    Raises:
        InternalError: DeepSpeed did not apply the update.
    """
    if _repeats_norm_on_gpu(engine):
        # DeepSpeed would copy every gradient to fp64 for a norm of its own, and wait for it.
        device = flat_partitions(engine)[0].device
        known = torch.full((), grad_norm, dtype=torch.float64, device=device)
        with _shadowed(engine.optimizer, "_get_norm_groups", [known]):
            engine.step()
    else:
        engine.step()
    if not engine.was_step_applied():
        raise InternalError("DeepSpeed dropped an update whose loss and gradient norm are finite.")


def _repeats_norm_on_gpu(engine: Any) -> bool:
    """Return whether DeepSpeed is to be spared the norm.

    On a CPU it is left to it: there the repetition is cheap next to the rest of a step.
    """
    if engine.zero_optimization_stage() != 3 or _is_offloaded(engine):
        return False
    return flat_partitions(engine)[0].is_cuda


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

"""The gradient norm of this rank's share, and the end of a step with an update or without one.

Read in deepspeed 0.19.8: runtime/zero/stage3.py, runtime/zero/stage_1_and_2.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from cpt.deepspeed_adapter.gradient_places import forget_sums, offloaded_gradients
from cpt.deepspeed_adapter.shards import flat_partitions
from cpt.errors import InternalError

HOST_ROW = 1 << 12
"""Elements of one fp32 sum on the host.

A CPU adds the squares of a row in few lanes, one after the other, and loses what is small next to
the sum: the norm of 13 million elements in one row is 0.05 % low, that of 579 million 11 %. In rows
of this length it is right to 1e-7.
"""
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
    for rows in _rows(_owned_gradients(engine)):
        norms.append(torch.linalg.vector_norm(rows, dim=-1, dtype=torch.float32).view(-1))
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    return torch.cat(norms).double().square().sum()


def _rows(gradients: list[torch.Tensor]) -> Iterator[torch.Tensor]:
    """Yield the same elements as tensors of which each row, or the whole if it is flat, is one sum.

    On a GPU each sum costs two launches and is accurate at any size.
    """
    detached = [gradient.detach() for gradient in gradients]
    if detached and detached[0].is_cuda:
        yield from joined(detached)
        return
    for gradient in detached:
        flat = gradient.reshape(-1)
        whole = flat.numel() - flat.numel() % HOST_ROW
        yield flat[:whole].view(-1, HOST_ROW)
        yield flat[whole:]


def joined(gradients: list[torch.Tensor]) -> list[torch.Tensor]:
    """Return views of the same elements in which neighbors of one buffer are one tensor.

    DeepSpeed keeps gradients as views of flat buffers, one per parameter.
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
        return offloaded_gradients(zero, flat_partitions(engine))
    gradients: list[torch.Tensor] = []
    for group in zero.averaged_gradients.values():
        if group is not None:
            gradients.extend(group)
    return gradients


def _is_offloaded(engine: Any) -> bool:
    """Return whether the optimizer state is on the host."""
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
    engine.state_reading.wait()
    # DeepSpeed would clip by a norm of its own: on a GPU from fp64 copies of all gradients, on the
    # host from one sum per tensor, which is too small for large ones.
    device = flat_partitions(engine)[0].device
    with _norm_replaced(engine, torch.full((), grad_norm, dtype=torch.float64, device=device)):
        engine.step()
    if not engine.was_step_applied():
        raise InternalError("DeepSpeed dropped an update whose loss and gradient norm are finite.")


def discard_gradients(engine: Any) -> None:
    """Finish an optimizer step without an update, on all ranks.

    DeepSpeed drops gradients by itself if their norm is not finite. Here it is told so whatever
    they are, because the decision was made before and holds for all ranks. The gradients are
    dropped and the engine's counters go on; neither weights nor Adam's state are touched.
    """
    # DeepSpeed marks a norm that is not finite as -1.
    device = flat_partitions(engine)[0].device
    with _norm_replaced(engine, torch.full((), -1.0, device=device)):
        engine.step()
    if engine.zero_optimization_stage() != 3 and _is_offloaded(engine):
        forget_sums(engine.optimizer)
    if engine.was_step_applied():
        raise InternalError(
            "DeepSpeed applied an update that was to be dropped; the last checkpoint is intact."
        )


@contextmanager
def _norm_replaced(engine: Any, norm: torch.Tensor) -> Iterator[None]:
    """Let the optimizer take `norm` for the global gradient norm inside the block."""
    name = "scaled_global_norm"
    result: Any = norm
    if engine.zero_optimization_stage() == 3:
        name = "_get_norm_groups"
        result = [norm]

    def return_result(*_: Any, **__: Any) -> Any:
        return result

    setattr(engine.optimizer, name, return_result)
    try:
        yield
    finally:
        delattr(engine.optimizer, name)

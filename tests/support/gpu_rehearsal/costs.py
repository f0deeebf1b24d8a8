"""What one operator costs a GPU: bytes read and written, FLOPs of products, kernel launches.

Decisions
    - An operator of torch is one launch that reads its inputs and writes its outputs once. What is
      changed in place is read and written. Columns with a stride travel as whole sectors.
    - A gather reads as much as it returns; a scatter writes as much as it was given.
    - An operator of this project (`torch.ops.cpt`) counts in the same way, with the exceptions of
      `OWN_OPERATORS`.
    - Views and allocations cost nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from tests.support.gpu_rehearsal.constants import (
    EIGHT_BIT_FLOPS_PER_SECOND,
    MEMORY_BYTES_PER_SECOND,
    PRODUCT_FLOPS_PER_SECOND,
    SECTOR_BYTES,
)

FREE = (
    "aten.empty",
    "aten.new_empty",
    "aten.detach",
    "aten._unsafe_view",
    "aten.lift_fresh",
    "aten.alias",
    "aten.is_",
    "aten._reshape_alias",
    "aten.set_",
    "aten.resize_",
    "aten.record_stream",
    "aten.sym_",
    "prim.device",
)
"""Operators that launch nothing, beside views."""
GATHERS = ("aten.index_select", "aten.embedding.", "aten.gather.", "aten.index.Tensor")
"""Operators that read as much of their first input as they return."""
OVERWRITERS = ("aten.copy_", "aten.fill_", "aten.zero_")
"""Operators that write their first input without reading it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cost:
    """The cost of one call of an operator."""

    num_bytes: int
    """Bytes read and written."""
    flops: int = 0
    """FLOPs of products."""
    launches: int = 1
    """Kernels started."""
    flops_per_second: float = PRODUCT_FLOPS_PER_SECOND
    """Speed of its products."""

    @property
    def seconds(self) -> float:
        """Time that the device needs for the longer of the two."""
        moving = self.num_bytes / MEMORY_BYTES_PER_SECOND
        return max(moving, self.flops / self.flops_per_second)


@dataclass(frozen=True, kw_only=True, slots=True)
class OwnOperator:
    """How an operator of this project differs from one launch that reads and writes all once."""

    launches: int = 1
    """Kernels that a call starts."""
    extra_bytes: Callable[[Sequence[Any]], int] | None = None
    """Bytes of work memory that its kernels write and read, from the arguments."""
    gathered: tuple[str, ...] = ()
    """Arguments of which as much is read as is returned."""
    only_read: tuple[str, ...] = ()
    """Arguments that it may change but whose kernel only reads them."""
    overwritten: tuple[str, ...] = ()
    """Arguments that it changes without reading them."""
    untouched: tuple[str, ...] = ()
    """Arguments that its kernel does not touch as a rule."""
    made_dense: tuple[str, ...] = ()
    """Arguments that it copies first unless they are contiguous."""


TILE_ROWS = 16
"""Rows of which the experts' kernels write one fp32 sum (ROWS in triton_expert_tiles.py)."""


def _tile_sums(args: Sequence[Any]) -> int:
    """Return the bytes of the sums over tiles of rows, for the gradient of a bias."""
    rows_RN = args[0]
    return 2 * rows_RN.numel() // TILE_ROWS * 4


OWN_OPERATORS = {
    "cpt.clear_empty_experts.default": OwnOperator(untouched=("matrices_EKN",)),
    "cpt.gated_unit_backward.default": OwnOperator(launches=2, extra_bytes=_tile_sums),
    "cpt.expert_output_backward.default": OwnOperator(launches=2, extra_bytes=_tile_sums),
    "cpt.gather_rows.default": OwnOperator(gathered=("rows",)),
    "cpt.loss_statistics.default": OwnOperator(only_read=("logits_Nv",)),
    "cpt.pack_rows.default": OwnOperator(gathered=("tokens_NM",), made_dense=("tokens_NM",)),
    "cpt.round_mxfp4.default": OwnOperator(overwritten=("out_nCR",)),
    "cpt.rms_norm.default": OwnOperator(made_dense=("x",)),
    "cpt.add_rms_norm.default": OwnOperator(made_dense=("residual", "y")),
    "cpt.rms_norm_backward.default": OwnOperator(
        launches=2, made_dense=("d_normed", "d_stream", "x")
    ),
}
"""The exceptions, by name."""


def stored_bytes(tensor: torch.Tensor) -> int:
    """Return the bytes that travel when a tensor is read or written once."""
    elements = 1
    strides = []
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if stride == 0 and size > 0:  # expanded: the same element again and again
            continue
        elements *= size
        if size > 1:
            strides.append(stride)
    num_bytes = elements * tensor.element_size()
    if strides and min(strides) > 1 and elements > 1024:
        num_bytes *= min(*strides, max(1, SECTOR_BYTES // tensor.element_size()))
    return num_bytes


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """Yield the tensors of an argument, which may be a list."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from tensors_in(part)


def cost_of(op: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Cost | None:
    """Return the cost of a call; None for one that launches nothing."""
    name = str(op)
    if op.is_view or name.startswith(FREE):
        return None
    inputs = list(tensors_in([*args, *kwargs.values()]))
    outputs = list(tensors_in(out))
    if not any(tensor.is_cuda for tensor in [*inputs, *outputs]):
        return None
    own = OWN_OPERATORS.get(name, OwnOperator())
    num_bytes = 0
    launches = own.launches
    for argument, value in _arguments(op, args, kwargs):
        for tensor in tensors_in(value):
            if argument.name in own.made_dense and not tensor.is_contiguous():
                num_bytes += stored_bytes(tensor) + tensor.numel() * tensor.element_size()
                launches += 1
            num_bytes += _argument_bytes(name, own, argument, tensor, args, outputs)
    for tensor in outputs:
        if not any(tensor is given for given in inputs):
            num_bytes += stored_bytes(tensor)
    if own.extra_bytes is not None:
        num_bytes += own.extra_bytes(args)
    speed = PRODUCT_FLOPS_PER_SECOND
    if name.startswith("aten._scaled"):
        speed = EIGHT_BIT_FLOPS_PER_SECOND
    flops = _flops(name, args, kwargs)
    return Cost(num_bytes=num_bytes, flops=flops, launches=launches, flops_per_second=speed)


def _arguments(
    op: Any, args: Sequence[Any], kwargs: dict[str, Any]
) -> Iterator[tuple[torch.Argument, Any]]:
    for position, argument in enumerate(op._schema.arguments):
        if position < len(args):
            yield argument, args[position]
        elif argument.name in kwargs:
            yield argument, kwargs[argument.name]


def _argument_bytes(
    name: str,
    own: OwnOperator,
    argument: torch.Argument,
    tensor: torch.Tensor,
    args: Sequence[Any],
    outputs: list[torch.Tensor],
) -> int:
    is_first = args and tensor is args[0]
    if argument.name in own.untouched:
        return 0
    if argument.name in own.only_read or argument.name in own.overwritten:
        return stored_bytes(tensor)
    if argument.alias_info is not None and argument.alias_info.is_write:
        written = _written_bytes(name, tensor, args)
        overwrites = name.startswith(OVERWRITERS) or argument.is_out
        return written if overwrites else 2 * written
    if (name.startswith(GATHERS) and is_first) or argument.name in own.gathered:
        return stored_bytes(outputs[0])
    return stored_bytes(tensor)


def _written_bytes(name: str, tensor: torch.Tensor, args: Sequence[Any]) -> int:
    """Return what an operator writes to an argument: a scatter only what it was given."""
    if name.startswith(("aten.index_put", "aten._index_put")):
        values = args[2]
        if values.ndim > 0:
            return stored_bytes(values)
        return sum(stored_bytes(index) for index in tensors_in(args[1]))
    if name.startswith(("aten.index_copy_", "aten.index_add_")):
        return stored_bytes(args[3])
    return stored_bytes(tensor)


def _flops(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    if name.startswith(("aten.mm.", "aten._scaled_mm.")):
        return 2 * args[0].numel() * args[1].shape[1]
    if name.startswith("aten.addmm."):
        return 2 * args[1].numel() * args[2].shape[1]
    if name.startswith("aten.bmm."):
        return 2 * args[0].numel() * args[1].shape[2]
    if name.startswith(("aten._grouped_mm", "aten._scaled_grouped_mm")):
        # Rows of one side belong to one expert each, whichever side that is.
        return 2 * args[0].numel() * args[1].shape[-1]
    if name.startswith("aten._flash_attention_forward"):
        return _attention_flops(args[0], args[5], kwargs)
    if name.startswith("aten._flash_attention_backward"):
        return _attention_flops(args[1], args[8], kwargs) * 5 // 2
    return 0


def _attention_flops(query_THD: torch.Tensor, longest: int, kwargs: dict[str, Any]) -> int:
    """Return the FLOPs of both products, with every document as long as the longest."""
    keys = longest // 2
    left = kwargs["window_size_left"]
    if left >= 0:
        keys = min(keys, left + 1)
    return 4 * query_THD.numel() * keys

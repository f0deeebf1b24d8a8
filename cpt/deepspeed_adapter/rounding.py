"""Rounded working weights: the forward pass sees what an export will hold, the master weights stay.

After an update DeepSpeed copies the fp32 master weights into the working weights. Here those of the
experts' matrices are overwritten with what rounding makes of them. Autograd's gradient with respect
to a working weight is applied to its master: the straight-through estimator, without code for it.

Decisions
    A matrix is rounded in place. Under ZeRO-3 that is this rank's part, on the device, on the host
    or in a file; a part consists of whole blocks, or the run is refused at start
    (`cpt.config.block_parts`). What lies on the host of a GPU travels to it in pieces. Under ZeRO 1
    and 2 it is the whole matrix, after the ranks have gathered it: parts would cut blocks there,
    and every rank has the matrix anyway.
    Only copies are rounded: master weights are tensors of their own, also where both are fp32
    (tests/dist/test_quantized_training.py would see it if a version of DeepSpeed shared them).

Read in deepspeed 0.19.8: runtime/zero/stage3.py (`_create_fp32_partitions`,
`_reassign_or_swap_out_partitioned_parameters`, `_post_step`), runtime/zero/stage_1_and_2.py
(`step`), runtime/zero/parameter_offload.py (`partition_all_parameters`).

Shape letters: n block columns (32 inputs of every output of an expert), B inputs of a block,
R outputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from cpt.deepspeed_adapter.experts import is_expert
from cpt.deepspeed_adapter.partition import full_local_shape

RoundBlocks = Callable[[torch.Tensor], None]
"""Rounds values (n, B, R) in place."""
LARGEST_PIECE = 1 << 22
"""Weights that travel to the device at once, if a block column has no more."""


def is_expert_matrix(parameter: Any) -> bool:
    """Return whether a parameter holds the matrices of this rank's experts, (experts, in, out)."""
    return is_expert(parameter) and len(full_local_shape(parameter)) == 3


def expert_matrices(engine: Any, *, trained: bool) -> list[Any]:
    """Return the expert matrices of a model that are trained, or those that are frozen."""
    found = []
    for parameter in engine.module.parameters():
        if parameter.requires_grad == trained and is_expert_matrix(parameter):
            found.append(parameter)
    return found


def block_columns(parameter: Any, block_inputs: int) -> torch.Tensor:
    """Return the block columns of an expert matrix that this rank holds, (n, block_inputs, R)."""
    held = getattr(parameter, "ds_tensor", parameter).data
    columns_nBR: torch.Tensor = held.view(-1, block_inputs, full_local_shape(parameter)[2])
    return columns_nBR


@torch.no_grad()
def publish_rounded_experts(
    engine: Any, round_blocks: RoundBlocks, block_inputs: int, device: torch.device
) -> None:
    """Overwrite this rank's working weights of all trained expert matrices with rounded ones.

    They hold the master weights in working precision when this is called, or were rounded before
    by a function that leaves its own results alone. All ranks call it together.

    Besides the weights this takes what `round_blocks` does; for weights that lie on the host of a
    GPU also a piece on the GPU, of `LARGEST_PIECE` weights or one block column.

    Args:
        engine: The DeepSpeed engine.
        round_blocks: Rounds values (n, block_inputs, R) on `device` in place.
        block_inputs: Inputs of a block.
        device: The device that computes; weights on the host travel to it in pieces.
    """
    matrices = expert_matrices(engine, trained=True)
    # Small parameters are never partitioned between steps; their parts are gathered again.
    persistent = [parameter for parameter in matrices if getattr(parameter, "ds_persist", False)]
    if persistent:
        persistent[0].partition(persistent)
    for parameter in matrices:
        _round_in_place(block_columns(parameter, block_inputs), round_blocks, device)
    if persistent:
        persistent[0].all_gather(persistent)


def _round_in_place(
    columns_nBR: torch.Tensor, round_blocks: RoundBlocks, device: torch.device
) -> None:
    """Round block columns, wherever they lie."""
    if columns_nBR.device.type == device.type:
        round_blocks(columns_nBR)
        return
    for piece_nBR in _pieces(columns_nBR):
        on_device_nBR = piece_nBR.to(device)
        round_blocks(on_device_nBR)
        piece_nBR.copy_(on_device_nBR)


def _pieces(columns_nBR: torch.Tensor) -> Iterator[torch.Tensor]:
    """Yield the block columns, as many at once as `LARGEST_PIECE` lets."""
    num_columns = max(1, LARGEST_PIECE // columns_nBR[0].numel())
    yield from columns_nBR.split(num_columns)

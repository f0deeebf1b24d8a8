"""Memory, traffic and time of Muon's update: matrices gathered, orthogonalized and scattered.

A block, the maps of an expert or a dense matrix, is worked on by one of the ranks that hold a part
of it (cpt/parallel/whole_blocks.py).  Of a block that k ranks hold, k - 1 parts of k travel there
and back.  Where the cuts of ZeRO fall between blocks nothing travels: an expert tensor whose
experts the ranks divide evenly.

Decisions
    The parts of a cut block count as equally large.
    Memory is that of the round with the most elements: the blocks, a copy of maps that are
    interleaved, the iterate before and after a step, and two matrices of products.
    Blocks of one size are divided in whole numbers; those of several even out.
    The iteration runs at the speed of the other bf16 products. Its exchanges and its copies from
    the host and back are not hidden behind it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch

from cpt.config import RunConfig
from cpt.model.linear_maps import LinearMaps
from cpt.parallel.whole_blocks import ROUND_NUMEL
from cpt.planning.hardware import Gpu
from cpt.planning.update_groups import expert_groups
from cpt.storage.state_bytes import BF16_BYTES
from cpt.training.newton_schulz import compute_dtype, newton_schulz_flops

if TYPE_CHECKING:
    from cpt.planning.memory import ParameterCounts


HOST_MUON_BYTES = 20
"""Bytes per parameter that Muon's update reads and writes beyond AdamW's 28: the running mean 12,
the look-ahead 12, its bf16 copy 6, decay 8, the orthogonal update 10.
"""
MUON_BYTES = HOST_MUON_BYTES + 8
"""The same on a GPU, with the copies of blocks between the order of travel and their own."""


class Shared(NamedTuple):
    """Tensors that are updated together, and the ranks that share them."""

    tensors: tuple[LinearMaps, ...]
    """The maps of the part of each tensor that a rank would hold without ZeRO."""
    ranks: int
    """Number of ranks that share them."""


def shared_tensors(config: RunConfig, counts: ParameterCounts) -> tuple[list[Shared], list[Shared]]:
    """Return (dense, experts) the groups of tensors that Muon updates."""
    dense = []
    if counts.muon_dense:
        dense.append(Shared(counts.muon_dense, config.world_size))
    local = [maps.of_part(config.ep_size) for maps in counts.muon_experts]
    experts = []
    first = 0
    for numels in expert_groups([maps.numel for maps in local]):
        tensors = tuple(local[first : first + len(numels)])
        first += len(numels)
        if tensors:
            experts.append(Shared(tensors, config.world_size // config.ep_size))
    return dense, experts


def moved_elements(shared: Shared, zero_stage: int) -> float:
    """Return the elements that all ranks of a group send to gather its matrices."""
    cuts = _cuts(shared, zero_stage)
    moved = 0.0
    for maps, (first_element, cut) in zip(shared.tensors, cuts, strict=True):
        for index in range(maps.blocks):
            start = first_element + index * maps.block_numel
            holders = (start + maps.block_numel - 1) // cut - start // cut + 1
            moved += maps.block_numel * (1 - 1 / holders)
    return moved


def _cuts(shared: Shared, zero_stage: int) -> list[tuple[int, int]]:
    """Return, of every tensor, where it begins in what ZeRO cuts, and how long a part is.

    ZeRO-3 cuts every tensor, the other stages cut the joined ones.
    """
    if zero_stage == 3:
        return [(0, math.ceil(maps.numel / shared.ranks)) for maps in shared.tensors]
    total = sum(maps.numel for maps in shared.tensors)
    cut = math.ceil(total / shared.ranks)
    found = []
    first = 0
    for maps in shared.tensors:
        found.append((first, cut))
        first += maps.numel
    return found


def sent_bytes(groups: Sequence[Shared], config: RunConfig) -> float:
    """Return the bytes that one rank sends in an update, on average: there and back, in bf16."""
    sent = 0.0
    for shared in groups:
        sent += 2 * BF16_BYTES * moved_elements(shared, config.zero_stage) / shared.ranks
    return sent


def busiest_flops(config: RunConfig, counts: ParameterCounts) -> float:
    """Return the operations of the rank with the most work in an update."""
    dense, experts = shared_tensors(config, counts)
    steps = config.train.muon.newton_schulz_steps
    flops = 0.0
    for shared in [*dense, *experts]:
        costs = []
        for maps in shared.tensors:
            block = maps.interleaved * newton_schulz_flops(maps.rows, maps.columns, steps)
            costs += maps.blocks * [block]
        busiest = max(sum(costs) / shared.ranks, max(costs))
        if len(set(costs)) == 1:
            busiest = math.ceil(len(costs) / shared.ranks) * costs[0]
        flops += busiest
    return flops


def orthogonalizing_seconds(config: RunConfig, counts: ParameterCounts, gpu: Gpu) -> float:
    """Return the time of the iteration, and of copies if the state is offloaded."""
    seconds = busiest_flops(config, counts) / gpu.attainable().product_flops
    if "offload_optimizer" in config.engine_json["zero_optimization"]:
        owned = counts.by_muon / config.world_size
        seconds += 2 * BF16_BYTES * owned / gpu.pcie_bytes_per_second
    return seconds


def rounds_memory(config: RunConfig, counts: ParameterCounts, device_type: str) -> int:
    """Return the bytes that the blocks of a round take on the device, and their iteration."""
    itemsize = compute_dtype(torch.device(device_type)).itemsize
    dense, experts = shared_tensors(config, counts)
    return max((itemsize * _round_elements(shared) for shared in [*dense, *experts]), default=0)


def _round_elements(shared: Shared) -> int:
    """Return the elements of all tensors of the largest round of a rank."""
    total = sum(maps.numel for maps in shared.tensors)
    largest = 0
    for maps in shared.tensors:
        per_rank = max(1, round(total / shared.ranks / maps.block_numel))
        blocks = min(per_rank, maps.blocks * len(shared.tensors))
        blocks = min(blocks, max(1, ROUND_NUMEL // maps.block_numel))
        copies = 4 if maps.interleaved > 1 else 3
        products = 2 * maps.interleaved * min(maps.rows, maps.columns) ** 2
        largest = max(largest, blocks * (copies * maps.block_numel + products))
    return largest

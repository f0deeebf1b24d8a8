"""Muon for matrices and AdamW for the rest (`train.optimizer: muon`), on whatever a rank holds.

    gradient, clipped -> running mean -> look-ahead -> whole matrices -> orthogonalized -> weights
    |---------- this rank's ranges, element by element -----|-- gathered, scattered --|

The definition, for a matrix W (R, C) with gradient G, momentum m and rate lr:

    M <- m M + (1 - m) G
    U <- (1 - m) G + m M                  with Nesterov, else M
    W <- (1 - lr decay) W - lr update_rms sqrt(max(R, C)) orthogonalize(U)

It is torch.optim.Muon's. The scale is Moonlight's (arXiv 2502.16982, section 2.2): an orthogonal
matrix has the root mean square 1 / sqrt(max(R, C)), so the update has `update_rms`. What one matrix
is, cpt/model/linear_maps.py says.

Decisions
    DeepSpeed's own Muon is not used. It orthogonalizes before it clips, so clipping by the norm
    scales updates of fixed size; it refuses reduce_scatter; its momentum is no state by ranges; and
    its kernels are compiled at import. Here Muon is an optimizer on flat partitions, which
    DeepSpeed steps like any other, in every stage and place of the state.
    A matrix is orthogonalized by one rank, and ranges of it travel there and back, in the precision
    of the iteration. Other ranks are at work on other matrices.
    The momentum is a running mean under the name of Adam's, `exp_avg`, so a run that goes over from
    AdamW keeps it. There is no second moment.
    State that is offloaded stays where it is: the device orthogonalizes, and pieces of the
    look-ahead travel to it and back.

Shape letters: N maps, B blocks, R rows, C columns, I maps that are interleaved in a block.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cpt.config.muon_section import MuonSection
from cpt.deepspeed_adapter.partition import full_local_numel, full_local_shape
from cpt.deepspeed_adapter.partition_spans import FlatPartition, partitions
from cpt.model.linear_maps import LinearMaps, linear_maps
from cpt.parallel.agreement import gather_json
from cpt.parallel.topology import Topology
from cpt.parallel.whole_blocks import Block, BlockRound, Group, HeldRange, plan_rounds
from cpt.storage.state_bytes import MOMENTS_KEY
from cpt.training.newton_schulz import compute_dtype, newton_schulz_flops, orthogonalize

IS_MUON = "orthogonalized"
"""Key of the parameter groups that Muon updates."""
MOMENTUM = "exp_avg"
"""Key of Muon's state: the running mean of gradients."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MatrixWork:
    """What a flat tensor of matrices needs for its update."""

    maps: tuple[LinearMaps, ...]
    """The maps of each block."""
    rounds: list[BlockRound]
    """The exchanges, and this rank's blocks."""
    group: Group
    """The ranks that share the matrices."""


def muon_group(matrices: list[nn.Parameter], weight_decay: float) -> dict[str, Any]:
    """Return the parameter group that Muon updates."""
    return {
        "name": "muon",
        "params": matrices,
        "weight_decay": weight_decay,
        MOMENTS_KEY: {MOMENTUM: "fp32"},
        IS_MUON: True,
    }


class MatrixOptimizer(torch.optim.Optimizer):
    """Updates the groups with the key `IS_MUON` by Muon, and leaves the others to AdamW.

    DeepSpeed looks for "muon" in the names of optimizers and takes those for its own.
    """

    def __init__(
        self, adamw: torch.optim.Optimizer, section: MuonSection, device: torch.device
    ) -> None:
        """Take over the groups of an optimizer.

        Args:
            adamw: Has all groups, and updates those that are not Muon's.
            section: The `train.muon` section.
            device: The device that orthogonalizes.
        """
        super().__init__(adamw.param_groups, adamw.defaults)
        self.state = adamw.state
        self._adamw = adamw
        self._section = section
        self._device = device
        self._work: dict[torch.Tensor, MatrixWork] = {}

    def hold(self, tensor: torch.Tensor, work: MatrixWork) -> None:
        """Learn which matrices a tensor of one of Muon's groups holds ranges of."""
        self._work[tensor] = work

    def hold_whole(self, parameters: dict[str, nn.Parameter]) -> None:
        """Learn of the matrices among the parameters of a model without an engine, by name."""
        for name, parameter in parameters.items():
            maps = linear_maps(name, full_local_shape(parameter))
            if maps is None:
                continue
            span = HeldRange(offset=0, start=0, numel=full_local_numel(parameter))
            self.hold(parameter, plan_work([maps], [{0: span}], rank=0, group=None))

    def hold_partitions(self, engine: Any, topology: Topology) -> None:
        """Learn which ranges of which matrices this rank's partitions hold; all ranks call it."""
        own = partitions(engine)
        spans: dict[str, list[int]] = {}
        for partition in own:
            for name, span in partition.spans.items():
                spans[name] = [span.offset, span.start, span.numel]
        by_rank = gather_json(spans, topology.control_group)
        for partition in own:
            tensors = _maps_of(partition)
            if tensors is not None:
                self.hold(partition.flat, _work_of(partition, tensors, by_rank))

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Update all parameters that have gradients; the gradients of matrices are used up."""
        others = []
        for group in self.param_groups:
            if not group.get(IS_MUON, False):
                others.append(group)
                continue
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)
        # DeepSpeed and load_state_dict replace both
        self._adamw.state = self.state
        self._adamw.param_groups = others
        self._adamw.step()

    def _update(self, parameter: torch.Tensor, group: dict[str, Any]) -> None:
        """Update one flat tensor, or one whole parameter."""
        work = self._work[parameter]
        state = self.state[parameter]
        if MOMENTUM not in state:
            state[MOMENTUM] = torch.zeros_like(parameter)
        weights = parameter.view(-1)
        look_ahead = self._look_ahead(parameter.grad, state[MOMENTUM])
        rate = float(group["lr"])
        weights.mul_(1 - rate * group["weight_decay"])
        dtype = compute_dtype(self._device)
        for one in work.rounds:
            whole = one.gather(look_ahead, dtype, self._device, work.group)
            self._orthogonalize_blocks(whole, one, work.maps)
            for piece, result in one.scatter(whole, weights.device, work.group):
                scale = update_scale(work.maps[piece.block], self._section.update_rms)
                weights.narrow(0, piece.start, piece.numel).add_(result, alpha=-rate * scale)
                del result
            del whole  # before the next round takes as much

    def _look_ahead(self, gradient: Any, momentum: torch.Tensor) -> torch.Tensor:
        """Return what is orthogonalized, in the memory of the gradient, and move the momentum."""
        decay = self._section.momentum
        momentum.view(-1).lerp_(gradient.view(-1), 1 - decay)
        look_ahead: torch.Tensor = gradient.view(-1)
        if self._section.nesterov:
            return look_ahead.lerp_(momentum.view(-1), decay)
        return look_ahead.copy_(momentum.view(-1))

    def _orthogonalize_blocks(
        self, whole: torch.Tensor, one: BlockRound, maps: Sequence[LinearMaps]
    ) -> None:
        """Orthogonalize the maps of this rank's blocks in place; equal ones that follow, at once.

        Args:
            whole: The blocks, one after the other.
            one: The round.
            maps: The maps of each block.
        """
        first = 0
        while first < len(one.blocks):
            same = maps[one.blocks[first]]
            last = first
            while last < len(one.blocks) and maps[one.blocks[last]].is_like(same):
                last += 1
            numel = (last - first) * same.block_numel
            blocks_BRCI = whole.narrow(0, one.starts[first], numel).view(-1, *same.block_shape)
            maps_NRC = blocks_BRCI.permute(0, 3, 1, 2).flatten(0, 1)
            results_NRC = orthogonalize(maps_NRC, self._section.newton_schulz_steps)
            results_BIRC = results_NRC.unflatten(0, (last - first, same.interleaved))
            blocks_BRCI.copy_(results_BIRC.permute(0, 2, 3, 1))
            first = last


def update_scale(maps: LinearMaps, update_rms: float) -> float:
    """Return the factor on an orthogonal matrix that gives it the root mean square."""
    return update_rms * math.sqrt(max(maps.rows, maps.columns))


def plan_work(
    tensors: Sequence[LinearMaps],
    spans_by_rank: Sequence[dict[int, HeldRange]],
    *,
    rank: int,
    group: Group,
) -> MatrixWork:
    """Divide the blocks of tensors among the ranks that hold parts of them.

    Args:
        tensors: The maps of each tensor.
        spans_by_rank: What each rank of the group holds, by number of the tensor.
        rank: This rank in the group.
        group: The ranks; None if there is only this one.
    """
    blocks = []
    maps = []
    for number, tensor in enumerate(tensors):
        cost = tensor.interleaved * newton_schulz_flops(tensor.rows, tensor.columns, steps=1)
        for index in range(tensor.blocks):
            offset = index * tensor.block_numel
            block = Block(tensor=number, offset=offset, numel=tensor.block_numel, cost=cost)
            blocks.append(block)
            maps.append(tensor)
    rounds = plan_rounds(blocks, spans_by_rank, rank)
    return MatrixWork(maps=tuple(maps), rounds=rounds, group=group)


def _maps_of(partition: FlatPartition) -> list[LinearMaps] | None:
    """Return the maps of the parameters of a partition; None if they are not Muon's."""
    found = []
    for name, parameter in partition.parameters.items():
        maps = linear_maps(name, full_local_shape(parameter))
        if maps is None:
            return None
        found.append(maps)
    return found


def _work_of(
    partition: FlatPartition, tensors: list[LinearMaps], by_rank: list[dict[str, list[int]]]
) -> MatrixWork:
    """Return the work of a partition.

    Args:
        partition: A partition of matrices.
        tensors: The maps of its parameters.
        by_rank: (offset, start, numel) of what every rank of the run holds of each parameter.
    """
    spans_by_rank = []
    for rank in torch.distributed.get_process_group_ranks(partition.group):
        spans = {}
        for number, name in enumerate(partition.parameters):
            if name in by_rank[rank]:
                offset, start, numel = by_rank[rank][name]
                spans[number] = HeldRange(offset=offset, start=start, numel=numel)
        spans_by_rank.append(spans)
    rank = torch.distributed.get_rank(partition.group)
    return plan_work(tensors, spans_by_rank, rank=rank, group=partition.group)

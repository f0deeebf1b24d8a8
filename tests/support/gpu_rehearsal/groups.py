"""A rank that is alone, with process groups of any size: collectives are checked and do nothing."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from cpt.parallel.topology import Topology
from tests.support.gpu_rehearsal.parts import place_in_code


@dataclass(frozen=True)
class Group:
    """One process group as this rank sees it."""

    name: str
    size: int
    rank: int
    backend: str
    """nccl, which takes tensors of the device only, or gloo, which takes those of the host."""


class _Work:
    def wait(self) -> None:
        """Return at once."""


class Collectives:
    """What this rank asked its groups for."""

    def __init__(self, rank: int, world_size: int, sp_size: int, ep_size: int) -> None:
        self._rank = rank
        self._sp = Group("sequence", sp_size, rank % sp_size, "nccl")
        self._ep = Group("experts", ep_size, rank % ep_size, "nccl")
        self._control = Group("control", world_size, rank, "gloo")
        self.calls: Counter[str] = Counter()
        self.wrong: list[str] = []

    def topology(self) -> Topology:
        """Return the layout of this rank on the fake device."""
        return Topology(
            rank=self._rank,
            world_size=self._control.size,
            sp_size=self._sp.size,
            ep_size=self._ep.size,
            device=torch.device("cuda", 0),
            sp_group=self._sp,  # type: ignore[arg-type]
            ep_group=self._ep,  # type: ignore[arg-type]
            control_group=self._control,  # type: ignore[arg-type]
        )

    def install(self) -> None:
        """Take the place of torch's collectives."""
        dist.all_to_all_single = self._all_to_all
        dist.all_reduce = self._all_reduce
        dist.get_rank = lambda group=None: (group or self._control).rank
        dist.get_world_size = lambda group=None: (group or self._control).size

    def _all_to_all(
        self,
        output: torch.Tensor,
        sent: torch.Tensor,
        output_split_sizes: list[int] | None = None,
        input_split_sizes: list[int] | None = None,
        group: Any = None,
        async_op: bool = False,
    ) -> _Work | None:
        self._note("all_to_all", group, output, sent)
        for tensor, sizes in ((output, output_split_sizes), (sent, input_split_sizes)):
            if sizes is not None and (len(sizes) != group.size or sum(sizes) != tensor.shape[0]):
                self.wrong.append(f"all_to_all of {tuple(tensor.shape)} with splits {sizes}")
        return _Work() if async_op else None

    def _all_reduce(
        self, tensor: torch.Tensor, op: Any = None, group: Any = None, async_op: bool = False
    ) -> _Work | None:
        self._note("all_reduce", group, tensor)
        return _Work() if async_op else None

    def _note(self, kind: str, group: Group, *tensors: torch.Tensor) -> None:
        self.calls[f"{kind} {group.name}"] += 1
        wanted = "cuda" if group.backend == "nccl" else "cpu"
        for tensor in tensors:
            file, function, line = place_in_code()
            if tensor.device.type != wanted:
                self.wrong.append(
                    f"{kind} on a {group.backend} group with a {tensor.device.type} tensor at "
                    f"{file}:{line} ({function})"
                )
            if not tensor.is_contiguous():
                self.wrong.append(
                    f"{kind} of a tensor that is not contiguous at {file}:{line} ({function})"
                )

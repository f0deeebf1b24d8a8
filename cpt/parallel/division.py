"""Division of work among ranks by its size; every rank computes the same result without asking.

This module imports no torch, because job scripts read manifests without it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

Key = TypeVar("Key", bound=Any)


def divide(
    sizes: Mapping[Key, int], ranks_of: Mapping[Key, Sequence[int]], world_size: int
) -> list[list[Key]]:
    """Give every piece of work to one rank, so that all ranks have about as much.

    Pieces that few ranks can do come first, then large ones, then by key. Each goes to the rank
    with the least work so far.

    Args:
        sizes: Size of each piece.
        ranks_of: The ranks that can do each piece.
        world_size: Number of ranks.

    Returns:
        The pieces of each rank, by rank.
    """
    pieces: list[list[Key]] = [[] for _ in range(world_size)]
    loads = [0] * world_size
    for key in sorted(sizes, key=lambda key: (len(ranks_of[key]), -sizes[key], key)):
        rank = min(ranks_of[key], key=lambda candidate: (loads[candidate], candidate))
        pieces[rank].append(key)
        loads[rank] += sizes[key]
    return pieces


def divide_among_all(sizes: Mapping[Key, int], world_size: int) -> list[list[Key]]:
    """Divide work that every rank can do; see `divide`."""
    return divide(sizes, dict.fromkeys(sizes, range(world_size)), world_size)
